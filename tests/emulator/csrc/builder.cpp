#include "builder.h"

#include <algorithm>
#include <array>

namespace ptx {
namespace {

const std::array kSpecialRegisters{
    "%tid.x",           "%tid.y",           "%tid.z",           "%ntid.x",
    "%ntid.y",          "%ntid.z",          "%ctaid.x",         "%ctaid.y",
    "%ctaid.z",         "%nctaid.x",        "%nctaid.y",        "%nctaid.z",
    "%laneid",          "%warpid",          "%nwarpid",         "%smid",
    "%nsmid",           "%gridid",          "%lanemask_eq",     "%lanemask_lt",
    "%lanemask_le",     "%lanemask_gt",     "%lanemask_ge",     "%dynamic_smem_size",
    "%total_smem_size", "%cluster_ctarank", "%cluster_nctarank"};

u64 round_up(u64 value, u64 alignment) { return (value + alignment - 1) / alignment * alignment; }

}  // namespace

u64 parse_number(const std::string& text, int line) {
    const bool negative = text[0] == '-';
    std::string digits = negative ? text.substr(1) : text;
    try {
        size_t used = 0;
        u64 value = 0;
        if (digits.starts_with("0f") || digits.starts_with("0F") || digits.starts_with("0d") ||
            digits.starts_with("0D")) {
            value = std::stoull(digits.substr(2), &used, 16);
            used += 2;
        } else {
            if (!digits.empty() && digits.back() == 'U') digits.pop_back();
            const bool binary = digits.starts_with("0b") || digits.starts_with("0B");
            value =
                binary ? std::stoull(digits.substr(2), &used, 2) : std::stoull(digits, &used, 0);
            if (binary) used += 2;
        }
        if (used == digits.size()) return negative ? 0 - value : value;
    } catch (const std::logic_error&) {  // falls through to the error below
    }
    throw ParseError(line, "expected a number, got '" + text + "'");
}

KernelBuilder::KernelBuilder(Module& module, std::shared_ptr<Kernel> kernel)
    : module_(module), kernel_(std::move(kernel)) {
    for (size_t i = 0; i < module.opcodes.size(); ++i) opcode_numbers_[module.opcodes[i]] = i32(i);
}

i32 KernelBuilder::fresh_register(int bits) {
    register_bits_.push_back(u8(bits));
    return i32(register_bits_.size()) - 1;
}

i32 KernelBuilder::declare_register(const std::string& name, int bits) {
    return scopes_.back().registers[name] = fresh_register(bits);
}

i32 KernelBuilder::sink() {
    if (sink_ < 0) sink_ = fresh_register(64);
    return sink_;
}

void KernelBuilder::declare_shared(const std::string& name, u64 num_bytes, u64 alignment) {
    kernel_->shared_bytes = u32(round_up(kernel_->shared_bytes, alignment));
    scopes_.back().variables[name] = {Space::kShared, kernel_->shared_bytes};
    kernel_->shared_bytes += u32(num_bytes);
}

void KernelBuilder::declare_local(const std::string& name, u64 num_bytes, u64 alignment) {
    kernel_->local_bytes = u32(round_up(kernel_->local_bytes, alignment));
    scopes_.back().variables[name] = {Space::kLocal, kernel_->local_bytes};
    kernel_->local_bytes += u32(num_bytes);
}

void KernelBuilder::offer_shared(const std::string& name, u64 num_bytes, u64 alignment) {
    offered_shared_[name] = {num_bytes, alignment};
}

std::optional<i32> KernelBuilder::find_register(const std::string& name) const {
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope)
        if (const auto found = scope->registers.find(name); found != scope->registers.end())
            return found->second;
    return std::nullopt;
}

std::optional<KernelBuilder::Variable> KernelBuilder::find_variable(const std::string& name) {
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope)
        if (const auto found = scope->variables.find(name); found != scope->variables.end())
            return found->second;
    for (const Parameter& parameter : kernel_->parameters)
        if (parameter.name == name) return Variable{Space::kParam, parameter.offset};
    if (const auto offered = offered_shared_.find(name); offered != offered_shared_.end()) {
        const auto [num_bytes, alignment] = offered->second;
        kernel_->shared_bytes = u32(round_up(kernel_->shared_bytes, alignment));
        const Variable variable{Space::kShared, kernel_->shared_bytes};
        scopes_.front().variables[name] = variable;
        kernel_->shared_bytes += u32(num_bytes);
        return variable;
    }
    return std::nullopt;
}

std::optional<Space> KernelBuilder::space_of(const std::string& name) const {
    if (std::ranges::find(dynamic_shared_, name) != dynamic_shared_.end()) return Space::kShared;
    const auto variable = const_cast<KernelBuilder*>(this)->find_variable(name);
    if (variable) return variable->space;
    if (module_.variables.contains(name)) return Space::kGlobal;
    return std::nullopt;
}

i32 KernelBuilder::constant(u64 value) {
    const auto [place, is_new] = constants_.try_emplace(value, i32(kernel_->constants.size()));
    if (is_new) {
        kernel_->constants.emplace_back();
        kernel_->constants.back().fill(value);
    }
    return ~place->second;
}

i32 KernelBuilder::preset(const std::string& name) {
    const auto [place, is_new] = presets_.try_emplace(name, 0);
    if (is_new) {
        place->second = fresh_register(64);
        kernel_->presets.push_back({place->second, name});
    }
    return place->second;
}

i32 KernelBuilder::row_of(const Operand& operand, int line) {
    if (operand.kind == Operand::kNumber) return constant(parse_number(operand.text, line));
    if (operand.kind != Operand::kName)
        throw ParseError(line, "expected a register or a constant, got '" + operand.text + "'");
    const std::string& name = operand.text;
    if (name == "_") return sink();
    if (const auto found = find_register(name)) return *found;
    if (name == "WARP_SZ") return constant(kLanes);
    if (std::ranges::find(kSpecialRegisters, name) != kSpecialRegisters.end()) return preset(name);
    if (std::ranges::find(dynamic_shared_, name) != dynamic_shared_.end()) {
        kernel_->constants.emplace_back();
        kernel_->constants.back().fill(u64(operand.offset));
        dynamic_constants_.push_back(i32(kernel_->constants.size()) - 1);
        return ~dynamic_constants_.back();
    }
    if (const auto variable = find_variable(name))
        return constant(variable->address + u64(operand.offset));
    if (module_.variables.contains(name)) {
        if (operand.offset != 0) throw ParseError(line, "unsupported offset behind '" + name + "'");
        return preset(name);
    }
    throw ParseError(line, "unknown name '" + name + "'");
}

std::vector<int> KernelBuilder::open_scopes() const {
    std::vector<int> ids;
    for (const Scope& scope : scopes_) ids.push_back(scope.id);
    return ids;
}

void KernelBuilder::place_label(const std::string& name, int line) {
    if (scopes_.back().id == 0) scopes_.back().id = ++num_scopes_;
    const bool is_new =
        labels_.emplace(std::pair(scopes_.back().id, name), i32(kernel_->code.size())).second;
    if (!is_new) throw ParseError(line, "label '" + name + "' is there twice");
}

void KernelBuilder::branch_to(const std::string& label, int line) {
    for (Scope& scope : scopes_)
        if (scope.id == 0) scope.id = ++num_scopes_;
    fixups_.push_back({kernel_->code.size(), label, open_scopes(), line});
}

void KernelBuilder::declare_branch_table(const std::string& name,
                                         const std::vector<std::string>& labels) {
    for (Scope& scope : scopes_)
        if (scope.id == 0) scope.id = ++num_scopes_;
    table_numbers_[name] = int(tables_.size());
    tables_.emplace_back(labels, open_scopes());
}

int KernelBuilder::branch_table(const std::string& name, int line) {
    const auto found = table_numbers_.find(name);
    if (found == table_numbers_.end())
        throw ParseError(line, "unknown branch table '" + name + "'");
    return found->second;
}

i32 KernelBuilder::resolve(const Fixup& fixup) const {
    for (auto scope = fixup.scopes.rbegin(); scope != fixup.scopes.rend(); ++scope)
        if (const auto found = labels_.find({*scope, fixup.label}); found != labels_.end())
            return found->second;
    throw ParseError(fixup.line, "unknown label '" + fixup.label + "'");
}

void KernelBuilder::emit(Instruction instruction, const Statement& statement) {
    const auto [place, is_new] =
        opcode_numbers_.try_emplace(statement.opcode, i32(module_.opcodes.size()));
    if (is_new) module_.opcodes.push_back(statement.opcode);
    instruction.opcode = place->second;
    instruction.line = statement.line;
    instruction.location = statement.location;
    if (!statement.predicate.empty()) {
        const auto predicate = find_register(statement.predicate);
        if (!predicate)
            throw ParseError(statement.line, "unknown predicate '" + statement.predicate + "'");
        instruction.predicate = *predicate;
        instruction.negated = statement.negated;
    }
    kernel_->code.push_back(instruction);
}

void KernelBuilder::finish(int line) {
    for (const Fixup& fixup : fixups_) {
        const i32 target = resolve(fixup);
        if (target >= i32(kernel_->code.size()))
            throw ParseError(fixup.line, "label at the end of a kernel");
        kernel_->code[fixup.instruction].target = target;
    }
    for (const auto& [labels, scopes] : tables_) {
        std::vector<i32> targets;
        for (const std::string& label : labels)
            targets.push_back(resolve({0, label, scopes, line}));
        kernel_->branch_tables.push_back(std::move(targets));
    }
    // Dynamic shared memory begins at a multiple of 128 bytes, what bulk copies may ask for.
    kernel_->shared_bytes = u32(round_up(kernel_->shared_bytes, 128));
    for (const i32 number : dynamic_constants_)
        for (u64& value : kernel_->constants[number]) value += kernel_->shared_bytes;
    kernel_->num_virtual_registers = i32(register_bits_.size());
    kernel_->num_rows = kernel_->num_virtual_registers;
    analyse(*kernel_);
    kernel_->executed.assign(kernel_->code.size(), 0);
    kernel_->reached.assign(kernel_->code.size(), 0);
}

}  // namespace ptx
