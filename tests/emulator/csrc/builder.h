#pragma once
// A kernel while it is being parsed: names in scopes, constants, labels.
#include <optional>
#include <unordered_map>

#include "ptx.h"

namespace ptx {

/// An operand as written.
struct Operand {
    enum Kind { kName, kNumber, kVector, kAddress, kPair, kList } kind = kName;
    std::string text;      // a name, or a number as written
    bool negated = false;  // !p
    i64 offset = 0;        // of an address, or of name+number
    std::vector<Operand> parts;
};

/// One instruction as written.
struct Statement {
    std::string predicate;
    bool negated = false;
    std::string opcode;
    std::vector<Operand> operands;
    int line = 0;
    int location = 0;
};

u64 parse_number(const std::string& text, int line);

class KernelBuilder {
 public:
    KernelBuilder(Module& module, std::shared_ptr<Kernel> kernel);

    // Names. Registers, variables and labels live in the innermost open scope.
    void open_scope() { scopes_.emplace_back(); }
    void close_scope() { scopes_.pop_back(); }
    i32 declare_register(const std::string& name, int bits);
    void declare_shared(const std::string& name, u64 num_bytes, u64 alignment);
    void declare_local(const std::string& name, u64 num_bytes, u64 alignment);
    void declare_dynamic_shared(const std::string& name) { dynamic_shared_.push_back(name); }
    /// Shared variables of the whole module take room only in kernels that name them.
    void offer_shared(const std::string& name, u64 num_bytes, u64 alignment);
    void place_label(const std::string& name, int line);
    void declare_branch_table(const std::string& name, const std::vector<std::string>& labels);

    // Operands as rows.
    i32 row_of(const Operand& operand, int line);
    i32 constant(u64 value);
    i32 preset(const std::string& name);
    i32 fresh_register(int bits);
    /// Where results that nobody wants go.
    i32 sink();
    int bits_of(i32 row) const { return row < 0 ? 64 : register_bits_.at(row); }
    /// The register with this name, if it is one.
    std::optional<i32> find_register(const std::string& name) const;
    /// The space a name's variable lies in, if the name is a variable.
    std::optional<Space> space_of(const std::string& name) const;

    void emit(Instruction instruction, const Statement& statement);
    void branch_to(const std::string& label, int line);  // for the instruction emitted next
    int branch_table(const std::string& name, int line);
    Kernel& kernel() { return *kernel_; }
    Module& module() { return module_; }

    /// Resolve labels, lay out dynamic shared memory, allocate registers.
    void finish(int line);

 private:
    struct Variable {
        Space space;
        u64 address;
    };
    struct Scope {
        std::unordered_map<std::string, i32> registers;
        std::unordered_map<std::string, Variable> variables;
        std::unordered_map<std::string, i32> labels;
        int id = 0;
    };
    struct Fixup {
        size_t instruction;
        std::string label;
        std::vector<int> scopes;  // innermost last
        int line;
    };
    std::vector<int> open_scopes() const;
    i32 resolve(const Fixup& fixup) const;
    std::optional<Variable> find_variable(const std::string& name);

    Module& module_;
    std::shared_ptr<Kernel> kernel_;
    std::vector<Scope> scopes_;
    int num_scopes_ = 0;
    std::vector<u8> register_bits_;
    std::unordered_map<u64, i32> constants_;
    std::unordered_map<std::string, i32> presets_;
    std::unordered_map<std::string, std::pair<u64, u64>> offered_shared_;
    std::vector<std::string> dynamic_shared_;
    std::vector<i32> dynamic_constants_;  // get the dynamic base added at the end
    std::map<std::pair<int, std::string>, i32> labels_;
    std::vector<Fixup> fixups_;
    std::map<std::string, int> table_numbers_;
    std::vector<std::pair<std::vector<std::string>, std::vector<int>>> tables_;
    std::unordered_map<std::string, i32> opcode_numbers_;
    i32 sink_ = -1;
};

/// Turn a statement into instructions. Throws ParseError for whatever is not on the allow-list.
void decode(KernelBuilder& builder, const Statement& statement);

/// Find basic blocks, let registers share rows, and decide whose definedness is followed.
void analyse(Kernel& kernel);

}  // namespace ptx
