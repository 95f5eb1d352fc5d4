// Statements to instructions: which opcodes and modifiers there are. What is not here is an error.
#include "decoder.h"

namespace ptx {

const std::map<std::string, Decoder::Function>& Decoder::functions() {
    static const std::map<std::string, Function> functions{
        {"mov", &Decoder::decode_move},
        {"cvta", &Decoder::decode_cvta},
        {"ld", &Decoder::decode_load_store},
        {"st", &Decoder::decode_load_store},
        {"ldu", &Decoder::decode_load_store},
        {"atom", &Decoder::decode_atomic},
        {"red", &Decoder::decode_atomic},
        {"fence", &Decoder::decode_fence},
        {"membar", &Decoder::decode_fence},
        {"bra", &Decoder::decode_branch},
        {"brx", &Decoder::decode_branch},
        {"ret", &Decoder::decode_leave},
        {"exit", &Decoder::decode_leave},
        {"bar", &Decoder::decode_barrier},
        {"barrier", &Decoder::decode_barrier},
        {"call", &Decoder::decode_call},
        {"shfl", &Decoder::decode_shuffle},
        {"vote", &Decoder::decode_vote},
        {"match", &Decoder::decode_match},
        {"redux", &Decoder::decode_reduce},
        {"elect", &Decoder::decode_elect},
        {"activemask", &Decoder::decode_simple},
        {"trap", &Decoder::decode_simple},
        {"nanosleep", &Decoder::decode_simple},
        {"prefetch", &Decoder::decode_simple},
        {"createpolicy", &Decoder::decode_simple},
        {"mbarrier", &Decoder::decode_transaction},
        {"cp", &Decoder::decode_bulk},
    };
    return functions;
}

void Decoder::run() {
    if (const auto form = computing_forms().find(statement_.opcode);
        form != computing_forms().end())
        return decode_form(form->second);
    const auto function = functions().find(modifiers_.name());
    if (function == functions().end()) modifiers_.fail();
    (this->*function->second)();
}

void Decoder::decode_form(const Form& form) {
    expect_operands(size_t(form.num_sources) + 1, size_t(form.num_sources) + 1);
    write_pair(operand(0));
    for (size_t i = 1; i < statement_.operands.size(); ++i) read(operand(i));
    out_.variant = form.variant;
    out_.copies = modifiers_.name() == "selp";
    out_.immediate = u64(builder_.bits_of(out_.destinations[0]));
    out_.handler = form.handler;
    builder_.emit(out_, statement_);
}

void Decoder::decode_move() {
    expect_operands(2, 2);
    const Operand &to = operand(0), &from = operand(1);
    if (from.kind == Operand::kName && from.text.starts_with("%clock")) {
        take_type(modifiers_);
        write(to);
        out_.variant = from.text == "%clock64" ? 64 : 32;
        return emit(read_cycles);
    }
    if (from.kind == Operand::kName && from.text.starts_with("%globaltimer")) {
        take_type(modifiers_);
        write(to);
        out_.variant = from.text == "%globaltimer" ? 0 : from.text == "%globaltimer_lo" ? 1 : 2;
        return emit(read_time);
    }
    const int bytes = modifiers_.take("pred")   ? 1
                      : modifiers_.take("b128") ? 16
                                                : take_type(modifiers_).bytes;
    if (bytes == 16) modifiers_.fail();
    if (to.kind == Operand::kVector) {
        for (const Operand& part : to.parts) write(part);
        read(from);
        out_.variant = u8(bytes * 8 / int(to.parts.size()));
        return emit(unpack);
    }
    write(to);
    read_all(from);
    if (from.kind == Operand::kVector) {
        out_.variant = u8(bytes * 8 / int(from.parts.size()));
        return emit(pack);
    }
    out_.copies = true;
    emit(bytes == 8 ? move64 : bytes == 4 ? move32 : move16);
}

void Decoder::decode_cvta() {
    expect_operands(2, 2);
    const bool to_space = modifiers_.take("to");
    const Space space = take_space();
    if (space == Space::kGeneric) modifiers_.fail();
    modifiers_.take_one<int>({{"u64", 8}, {"u32", 4}});
    const u64 window = space == Space::kShared  ? kSharedWindow
                       : space == Space::kLocal ? kLocalWindow
                       : space == Space::kParam ? kParamWindow
                                                : 0;
    write(operand(0));
    read(operand(1));
    out_.immediate = to_space ? 0 - window : window;
    emit(add_window);
}

Space Decoder::take_space() {
    return modifiers_.take_one_or<Space>(Space::kGeneric, {{"global", Space::kGlobal},
                                                           {"shared", Space::kShared},
                                                           {"shared::cta", Space::kShared},
                                                           {"shared::cluster", Space::kShared},
                                                           {"local", Space::kLocal},
                                                           {"param", Space::kParam},
                                                           {"const", Space::kConst}});
}

void Decoder::decode_branch() {
    modifiers_.take("uni");
    if (modifiers_.name() == "brx") {
        modifiers_.take_one<int>({{"idx", 0}});
        read(operand(0));
        out_.immediate = u64(builder_.branch_table(operand(1).text, statement_.line));
        out_.splits = true;
        return emit(branch_indexed);
    }
    expect_operands(1, 1);
    builder_.branch_to(operand(0).text, statement_.line);
    emit(branch);
}

void Decoder::decode_leave() {
    modifiers_.take("uni");
    out_.splits = true;
    emit(leave);
}

void Decoder::decode_barrier() {
    const bool is_bar = modifiers_.name() == "bar";
    modifiers_.take("cta");
    out_.splits = true;
    if (modifiers_.take("warp")) {
        modifiers_.take_one<int>({{"sync", 0}});
        expect_operands(1, 1);
        read(operand(0));
        return emit(sync_warp);
    }
    const bool is_reduction = modifiers_.take("red");
    if (is_reduction)
        out_.variant =
            modifiers_.take_one<u8>({{"popc", kCountTrue}, {"and", kAllTrue}, {"or", kAnyTrue}});
    else
        out_.variant = modifiers_.take_one<u8>({{"sync", kSync}, {"arrive", kArrive}});
    if (!modifiers_.take("aligned") && !is_bar) out_.variant |= kUnaligned;
    if (is_reduction) modifiers_.take_one<int>({{"u32", 0}, {"pred", 0}});
    size_t next = 0;
    if (is_reduction) write(operand(next++));
    const size_t last = statement_.operands.size() - (is_reduction ? 1 : 0);
    read(operand(next++));
    if (next < last)
        read(operand(next++));
    else
        read_row(builder_.constant(0));
    if (is_reduction) read(operand(next++));
    emit(barrier);
}

void Decoder::decode_call() {
    modifiers_.take("uni");
    const bool has_result = operand(0).kind == Operand::kList;
    const Operand& name = operand(has_result ? 1 : 0);
    const auto& externs = builder_.module().externs;
    const auto found = std::ranges::find(externs, name.text);
    if (found == externs.end())
        throw ParseError(statement_.line,
                         "unsupported call of '" + name.text + "', which is no extern function");
    if (has_result)
        for (const Operand& result : operand(0).parts) write(result);
    const size_t list = has_result ? 2 : 1;
    if (list < statement_.operands.size())
        for (const Operand& argument : operand(list).parts) read(argument);
    out_.immediate = u64(found - externs.begin());
    emit(call);
}

void Decoder::decode_shuffle() {
    expect_operands(5, 5);
    modifiers_.take_one<int>({{"sync", 0}});
    out_.variant = modifiers_.take_one<u8>(
        {{"idx", kIndex}, {"up", kUp}, {"down", kDown}, {"bfly", kButterfly}});
    modifiers_.take_one<int>({{"b32", 0}});
    write_pair(operand(0));
    for (size_t i = 1; i < 5; ++i) read(operand(i));
    out_.splits = out_.copies = true;
    emit(shuffle);
}

void Decoder::decode_vote() {
    expect_operands(3, 3);
    modifiers_.take_one<int>({{"sync", 0}});
    out_.variant = modifiers_.take_one<u8>(
        {{"ballot", kBallot}, {"all", kAll}, {"any", kAny}, {"uni", kUniform}});
    modifiers_.take_one<int>({{"b32", 0}, {"pred", 0}});
    write(operand(0));
    read(operand(1));
    read(operand(2));
    out_.splits = true;
    emit(vote);
}

void Decoder::decode_match() {
    expect_operands(3, 3);
    const bool any = modifiers_.take_one<bool>({{"any", true}, {"all", false}});
    modifiers_.take_one<int>({{"sync", 0}});
    out_.element_bytes = modifiers_.take_one<u8>({{"b32", 4}, {"b64", 8}});
    write_pair(operand(0));
    read(operand(1));
    read(operand(2));
    out_.splits = true;
    emit(any ? match_any : match_all);
}

void Decoder::decode_reduce() {
    expect_operands(3, 3);
    modifiers_.take_one<int>({{"sync", 0}});
    const bool is_signed =
        modifiers_.take_one<bool>({{"s32", true}, {"u32", false}, {"b32", false}});
    out_.variant = modifiers_.take_one<u8>({{"add", kAdd},
                                            {"min", is_signed ? kMinSigned : kMinUnsigned},
                                            {"max", is_signed ? kMaxSigned : kMaxUnsigned},
                                            {"and", kAnd},
                                            {"or", kOr},
                                            {"xor", kXor}});
    write(operand(0));
    read(operand(1));
    read(operand(2));
    out_.splits = true;
    emit(reduce);
}

void Decoder::decode_elect() {
    expect_operands(2, 2);
    modifiers_.take_one<int>({{"sync", 0}});
    write_pair(operand(0));
    read(operand(1));
    out_.splits = true;
    emit(elect);
}

void Decoder::decode_simple() {
    const std::string& name = modifiers_.name();
    if (name == "activemask") {
        modifiers_.take_one<int>({{"b32", 0}});
        write(operand(0));
        return emit(active_mask);
    }
    if (name == "trap") return emit(trap);
    if (name == "nanosleep") {
        modifiers_.take_one<int>({{"u32", 0}});
        read(operand(0));
        return emit(sleep);
    }
    if (name == "prefetch") {
        take_space();
        modifiers_.take_one<int>({{"L1", 0}, {"L2", 0}});
        read_address(operand(0));
        return emit(nothing);
    }
    // createpolicy: an opaque cache policy; zero stands for each of them.
    for (const char* word : {"fractional", "L2::evict_first", "L2::evict_last", "L2::evict_normal",
                             "L2::evict_unchanged"})
        modifiers_.take(word);
    modifiers_.take_one<int>({{"b64", 0}});
    write(operand(0));
    read_row(builder_.constant(0));
    emit(move64);
}

void decode(KernelBuilder& builder, const Statement& statement) {
    Decoder(builder, statement).run();
}

}  // namespace ptx
