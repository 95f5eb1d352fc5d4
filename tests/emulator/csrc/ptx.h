#pragma once
// What the parser makes of PTX text: kernels as lists of decoded instructions.
#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace ptx {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using i8 = int8_t;
using i16 = int16_t;
using i32 = int32_t;
using i64 = int64_t;

constexpr int kLanes = 32;
constexpr u32 kAllLanes = 0xffffffffu;

// Windows of the generic address space. Global memory lies outside all of them.
constexpr u64 kSharedWindow = 0x0001'0000'0000'0000;
constexpr u64 kLocalWindow = 0x0002'0000'0000'0000;
constexpr u64 kParamWindow = 0x0003'0000'0000'0000;
constexpr u64 kWindowSize = u64{1} << 32;

enum class Space : u8 { kGeneric, kGlobal, kShared, kLocal, kParam, kConst };
enum class Order : u8 { kWeak, kRelaxed, kAcquire, kRelease, kAcquireRelease };
enum class Scope : u8 { kCta, kGpu, kSys };

/// What the scheduler does after an instruction.
enum class Outcome : u8 {
    kAdvance,  // go on with the next instruction
    kJumped,   // groups and program counters are already as they should be
    kBlocked,  // the group waits; nothing was executed
};

struct Instruction;
struct Step;
using Handler = Outcome (*)(Step&, const Instruction&);

/// One decoded instruction. Operands are rows of 32 values: a row >= 0 is a register of the warp, a
/// row < 0 the constant number ~row of the kernel.
struct Instruction {
    Handler handler = nullptr;
    i32 predicate = -1;  // row of a predicate register, or -1
    bool negated = false;
    bool splits = false;  // lanes whose predicate is false must leave the group first
    u8 num_destinations = 0;
    u8 num_sources = 0;
    std::array<i32, 8> destinations{};
    std::array<i32, 10> sources{};
    // Memory operands.
    Space space = Space::kGeneric;
    Order order = Order::kWeak;
    Scope scope = Scope::kSys;
    u8 element_bytes = 0;
    u8 num_elements = 1;
    bool is_signed = false;  // narrow loads extend their sign
    u8 variant = 0;          // which of an opcode's variants; each handler defines its own
    i64 offset = 0;          // added to the address
    u64 immediate = 0;       // destination width in bits for loads; index into a table for others
    i32 target = -1;         // where a branch goes
    i32 line = 0;            // in the PTX text
    i32 location = 0;        // index into Module::locations
    i32 opcode = 0;          // index into Module::opcodes
    i32 site = 0;            // its number in the machine that loaded it
    bool checks_definedness = false;  // some operand may be unwritten; see Kernel::tracked
    bool copies = false;              // moves values, undefined ones too, without looking at them
};

/// A place in the .cu source: where the instruction comes from and what it was inlined into.
struct Location {
    i32 file = 0, line = 0;
    i32 outer_file = 0, outer_line = 0;
    auto operator<=>(const Location&) const = default;
};

struct Parameter {
    std::string name;
    u32 offset = 0, num_bytes = 0;
};

/// A register that is filled when a warp starts.
struct Preset {
    i32 row;
    std::string name;  // a special register, or the name of a variable in global memory
};

struct Kernel {
    std::string name;
    std::vector<Parameter> parameters;
    u32 parameter_bytes = 0;
    std::vector<Instruction> code;
    std::vector<std::array<u64, kLanes>> constants;
    std::vector<Preset> presets;
    std::vector<std::vector<i32>> branch_tables;
    std::vector<u32> block_starts;  // sorted indices of the basic blocks' first instructions
    i32 num_rows = 0;               // registers per lane after allocation
    i32 num_virtual_registers = 0;
    u32 shared_bytes = 0;  // static; dynamic shared memory begins behind it
    u32 local_bytes = 0;   // per thread
    bool uses_async_proxy = false;
    std::vector<bool> tracked;  // rows whose definedness is followed at run time
    std::vector<u64> reached;   // per instruction: how often a group of lanes came to it
    std::vector<u64> executed;  // how often at least one lane's predicate let it run
};

struct GlobalVariable {
    u64 num_bytes = 0;
    u64 alignment = 1;
    std::vector<u8> initial;
};

struct Module {
    std::map<std::string, std::shared_ptr<Kernel>> kernels;
    std::map<std::string, GlobalVariable> variables;
    std::vector<Location> locations{Location{}};
    std::map<i32, std::string> files;
    std::vector<std::string> opcodes;
    std::vector<std::string> externs;  // functions that are called but not defined
    std::string target;

    /// "ptx.cuh:31 in dispatch.cu:120", or "" without line information.
    std::string describe(const Instruction& instruction) const;
};

class ParseError : public std::runtime_error {
 public:
    ParseError(int line, const std::string& what)
        : std::runtime_error("load: line " + std::to_string(line) + ": " + what) {}
};

std::shared_ptr<Module> parse(const std::string& text);

}  // namespace ptx
