// Statements to instructions: which opcodes and modifiers there are. What is not here is an error.
#include <algorithm>

#include "builder.h"
#include "forms.h"
#include "handlers.h"

namespace ptx {
namespace {

/// The modifiers of an opcode, taken one by one; whatever is left over is unknown.
class Modifiers {
 public:
    explicit Modifiers(const Statement& statement) : statement_(statement) {
        size_t begin = 0;
        const std::string& text = statement.opcode;
        while (begin <= text.size()) {
            const size_t end = std::min(text.find('.', begin), text.size());
            words_.push_back(text.substr(begin, end - begin));
            begin = end + 1;
        }
        name_ = words_.front();
        words_.erase(words_.begin());
    }
    const std::string& name() const { return name_; }
    bool take(const std::string& word) {
        const auto found = std::ranges::find(words_, word);
        if (found == words_.end()) return false;
        words_.erase(found);
        return true;
    }
    /// The value of the first of these words that is there.
    template <class T>
    T take_one(std::initializer_list<std::pair<const char*, T>> choices) {
        for (const auto& [word, value] : choices)
            if (take(word)) return value;
        fail();
    }
    template <class T>
    T take_one_or(T otherwise, std::initializer_list<std::pair<const char*, T>> choices) {
        for (const auto& [word, value] : choices)
            if (take(word)) return value;
        return otherwise;
    }
    void done() const {
        if (!words_.empty()) fail();
    }
    [[noreturn]] void fail() const {
        throw ParseError(statement_.line,
                         "unsupported instruction '" + statement_.opcode + "'" +
                             (words_.empty() ? "" : " (at '." + words_.front() + "')"));
    }

 private:
    const Statement& statement_;
    std::string name_;
    std::vector<std::string> words_;
};

struct TypeInfo {
    int bytes;
    bool is_signed;
};
TypeInfo take_type(Modifiers& modifiers) {
    return modifiers.take_one<TypeInfo>({{"b8", {1, false}},
                                         {"u8", {1, false}},
                                         {"s8", {1, true}},
                                         {"b16", {2, false}},
                                         {"u16", {2, false}},
                                         {"s16", {2, true}},
                                         {"b32", {4, false}},
                                         {"u32", {4, false}},
                                         {"s32", {4, true}},
                                         {"f32", {4, false}},
                                         {"b64", {8, false}},
                                         {"u64", {8, false}},
                                         {"s64", {8, true}},
                                         {"f64", {8, false}}});
}

class Decoder {
 public:
    Decoder(KernelBuilder& builder, const Statement& statement)
        : builder_(builder), statement_(statement), modifiers_(statement) {}
    void run();

 private:
    using Function = void (Decoder::*)();
    static const std::map<std::string, Function>& functions();

    void decode_move();
    void decode_cvta();
    void decode_load_store();
    void decode_call_parameter(bool is_load, i32 row);
    void decode_atomic();
    void decode_fence();
    void decode_branch();
    void decode_leave();
    void decode_barrier();
    void decode_call();
    void decode_shuffle();
    void decode_vote();
    void decode_match();
    void decode_reduce();
    void decode_elect();
    void decode_simple();
    void decode_transaction();
    void decode_bulk();
    void decode_form(const Form& form);

    // Operands.
    const Operand& operand(size_t number) const {
        if (number >= statement_.operands.size())
            throw ParseError(statement_.line,
                             "expected more operands for '" + statement_.opcode + "'");
        return statement_.operands[number];
    }
    void expect_operands(size_t least, size_t most) const {
        const size_t count = statement_.operands.size();
        if (count < least || count > most)
            throw ParseError(statement_.line, "expected " + std::to_string(least) +
                                                  " operands for '" + statement_.opcode +
                                                  "', got " + std::to_string(count));
    }
    void write(const Operand& what) {
        const i32 row = builder_.row_of(what, statement_.line);
        if (row < 0)
            throw ParseError(statement_.line, "expected a register, got '" + what.text + "'");
        out_.destinations[out_.num_destinations++] = row;
    }
    void read_row(i32 row) { out_.sources[out_.num_sources++] = row; }
    void read(const Operand& what) {
        i32 row = builder_.row_of(what, statement_.line);
        if (what.negated) row = invert(row);
        read_row(row);
    }
    void read_all(const Operand& what) {
        if (what.kind != Operand::kVector) return read(what);
        for (const Operand& part : what.parts) read(part);
    }
    /// A negated predicate as an operand becomes an instruction of its own.
    i32 invert(i32 row) {
        Instruction inversion;
        inversion.handler = computing_forms().at("not.pred").handler;
        inversion.num_sources = inversion.num_destinations = 1;
        inversion.sources[0] = row;
        inversion.destinations[0] = builder_.fresh_register(8);
        Statement always = statement_;
        always.predicate.clear();
        builder_.emit(inversion, always);
        return inversion.destinations[0];
    }
    void read_address(const Operand& what) {
        if (what.kind != Operand::kAddress)
            throw ParseError(statement_.line, "expected an address in brackets");
        read(what.parts.at(0));
        out_.offset = what.offset;
    }
    /// For instructions with several addresses: offsets are added beforehand.
    void read_plain_address(const Operand& what) {
        read_address(what);
        if (out_.offset != 0)
            throw ParseError(statement_.line, "unsupported offset in '" + statement_.opcode + "'");
    }
    /// d or d|p
    void write_pair(const Operand& what) {
        if (what.kind != Operand::kPair) return write(what);
        write(what.parts.at(0));
        write(what.parts.at(1));
    }
    void emit(Handler handler) {
        out_.handler = handler;
        modifiers_.done();
        builder_.emit(out_, statement_);
    }
    void take_order_and_scope(Order otherwise, Scope scope_otherwise);
    Space take_space();

    KernelBuilder& builder_;
    const Statement& statement_;
    Modifiers modifiers_;
    Instruction out_;
};

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

void Decoder::take_order_and_scope(Order otherwise, Scope scope_otherwise) {
    out_.order = otherwise;
    out_.scope = scope_otherwise;
    if (modifiers_.take("volatile") || modifiers_.take("mmio")) {
        modifiers_.take("relaxed");
        out_.order = Order::kRelaxed;
        out_.scope = Scope::kSys;
    } else {
        out_.order =
            modifiers_.take_one_or<Order>(otherwise, {{"weak", Order::kWeak},
                                                      {"relaxed", Order::kRelaxed},
                                                      {"acquire", Order::kAcquire},
                                                      {"release", Order::kRelease},
                                                      {"acq_rel", Order::kAcquireRelease}});
    }
    // A cluster is one CTA here: kernels with larger clusters are refused when launched.
    out_.scope = modifiers_.take_one_or<Scope>(out_.scope, {{"cta", Scope::kCta},
                                                            {"cluster", Scope::kCta},
                                                            {"gpu", Scope::kGpu},
                                                            {"sys", Scope::kSys}});
}

void Decoder::decode_call_parameter(bool is_load, i32 row) {
    if (operand(is_load ? 1 : 0).offset != 0) modifiers_.fail();
    const int bytes = take_type(modifiers_).bytes;
    if (is_load) {
        write(operand(0));
        read_row(row);
    } else {
        out_.destinations[out_.num_destinations++] = row;
        read(operand(1));
    }
    emit(bytes == 8 ? move64 : bytes == 4 ? move32 : move16);
}

void Decoder::decode_load_store() {
    expect_operands(2, 3);
    const bool is_load = modifiers_.name() != "st";
    const Operand& address = operand(is_load ? 1 : 0);
    const Operand& value = operand(is_load ? 0 : 1);
    out_.space = take_space();
    if (out_.space == Space::kParam && address.kind == Operand::kAddress)
        if (const auto row = builder_.find_register(address.parts.at(0).text);
            row && builder_.bits_of(*row) <= 64)
            if (address.parts.at(0).text[0] != '%') return decode_call_parameter(is_load, *row);
    take_order_and_scope(Order::kWeak, Scope::kSys);
    if (is_load) modifiers_.take("nc");
    for (const char* hint :
         {"L1::evict_normal", "L1::evict_unchanged", "L1::evict_first", "L1::evict_last",
          "L1::no_allocate", "L2::evict_first", "L2::evict_last", "L2::evict_normal", "L2::64B",
          "L2::128B", "L2::256B", "L2::cache_hint", "ca", "cg", "cs", "lu", "cv", "wb", "wt"})
        modifiers_.take(hint);  // how to cache, not what is read
    out_.num_elements = u8(modifiers_.take_one_or<int>(1, {{"v2", 2}, {"v4", 4}, {"v8", 8}}));
    const TypeInfo type = take_type(modifiers_);
    out_.element_bytes = u8(type.bytes);
    out_.is_signed = type.is_signed;
    read_address(address);
    const size_t parts = value.kind == Operand::kVector ? value.parts.size() : 1;
    if (parts != out_.num_elements) modifiers_.fail();
    if (!is_load) {
        if (out_.space == Space::kParam || out_.space == Space::kConst) modifiers_.fail();
        read_all(value);
        return emit(store);
    }
    if (value.kind == Operand::kVector)
        for (const Operand& part : value.parts) write(part);
    else
        write(value);
    out_.immediate =
        u64(value.kind == Operand::kVector ? 64 : builder_.bits_of(out_.destinations[0]));
    if (out_.space == Space::kConst) out_.space = Space::kGlobal;
    emit(out_.space == Space::kParam ? load_parameter : load);
}

void Decoder::decode_atomic() {
    const bool is_reduction = modifiers_.name() == "red";
    if (modifiers_.take("async")) modifiers_.fail();
    take_order_and_scope(Order::kRelaxed, Scope::kGpu);
    out_.space = take_space();
    modifiers_.take("L2::cache_hint");
    const std::string operation = modifiers_.take_one<std::string>({{"exch", "exch"},
                                                                    {"cas", "cas"},
                                                                    {"add", "add"},
                                                                    {"min", "min"},
                                                                    {"max", "max"},
                                                                    {"and", "and"},
                                                                    {"or", "or"},
                                                                    {"xor", "xor"},
                                                                    {"inc", "inc"},
                                                                    {"dec", "dec"}});
    modifiers_.take("noftz");
    const std::string type = modifiers_.take_one<std::string>({{"b32", "b32"},
                                                               {"u32", "u32"},
                                                               {"s32", "s32"},
                                                               {"f32", "f32"},
                                                               {"b64", "b64"},
                                                               {"u64", "u64"},
                                                               {"s64", "s64"},
                                                               {"f64", "f64"},
                                                               {"f16x2", "f16x2"},
                                                               {"bf16x2", "bf16x2"}});
    static const std::map<std::string, AtomicVariant> plain{
        {"exch", kExchange},        {"cas", kCompareSwap}, {"add", kAtomicAdd},
        {"and", kAtomicAnd},        {"or", kAtomicOr},     {"xor", kAtomicXor},
        {"inc", kIncrement},        {"dec", kDecrement},   {"min", kAtomicMinUnsigned},
        {"max", kAtomicMaxUnsigned}};
    out_.element_bytes = type.ends_with("64") ? 8 : 4;
    out_.variant = plain.at(operation);
    if (type[0] == 's' && operation == "min") out_.variant = kAtomicMinSigned;
    if (type[0] == 's' && operation == "max") out_.variant = kAtomicMaxSigned;
    if (type.find('f') != std::string::npos) {
        if (operation != "add") modifiers_.fail();
        out_.variant = type == "f32"     ? kAtomicAddFloat
                       : type == "f64"   ? kAtomicAddDouble
                       : type == "f16x2" ? kAtomicAddHalves
                                         : kAtomicAddBrains;
    }
    size_t next = 0;
    if (!is_reduction)
        write(operand(next++));
    else
        out_.destinations[out_.num_destinations++] = builder_.sink();
    read_address(operand(next++));
    read(operand(next++));
    if (operation == "cas") read(operand(next++));
    if (next < statement_.operands.size()) modifiers_.fail();
    emit(atomic);
}

void Decoder::decode_fence() {
    if (modifiers_.take("proxy")) {
        if (!modifiers_.take("async")) modifiers_.fail();
        out_.space = take_space();
        return emit(proxy_fence);
    }
    if (modifiers_.take(
            "mbarrier_init")) {  // a release of the barrier's initial state at cluster scope
        if (!modifiers_.take("release")) modifiers_.fail();
        out_.scope = modifiers_.take_one<Scope>({{"cluster", Scope::kCta}});
        out_.order = Order::kAcquireRelease;
        return emit(fence);
    }
    modifiers_.take("sc");
    modifiers_.take("acq_rel");
    out_.order = Order::kAcquireRelease;
    out_.scope = modifiers_.take_one<Scope>({{"cta", Scope::kCta},
                                             {"cluster", Scope::kCta},
                                             {"gpu", Scope::kGpu},
                                             {"gl", Scope::kGpu},
                                             {"sys", Scope::kSys}});
    emit(fence);
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

void Decoder::decode_transaction() {
    const std::string what = modifiers_.take_one<std::string>({{"init", "init"},
                                                               {"inval", "inval"},
                                                               {"arrive", "arrive"},
                                                               {"expect_tx", "expect"},
                                                               {"try_wait", "wait"},
                                                               {"test_wait", "wait"}});
    const bool with_bytes = modifiers_.take("expect_tx");
    const bool by_parity = modifiers_.take("parity");
    out_.order = what == "wait"     ? Order::kAcquire
                 : what == "expect" ? Order::kRelaxed
                                    : Order::kRelease;
    take_order_and_scope(out_.order, Scope::kCta);
    out_.space = take_space();
    if (out_.space == Space::kGeneric) modifiers_.fail();
    modifiers_.take_one<int>({{"b64", 0}});
    builder_.kernel().uses_async_proxy = true;
    if (what == "init" || what == "inval" || what == "expect") {
        read_address(operand(0));
        if (what != "inval") read(operand(1));
        out_.variant = kExpectOnly;
        return emit(what == "init"    ? barrier_init
                    : what == "inval" ? barrier_invalidate
                                      : barrier_arrive);
    }
    write(operand(0));
    read_address(operand(1));
    if (what == "wait") {
        read(operand(2));
        return emit(by_parity ? barrier_try : barrier_try_state);
    }
    if (statement_.operands.size() > 2)
        read(operand(2));
    else
        read_row(builder_.constant(1));
    out_.variant = with_bytes ? kArriveAndExpect : kArriveOnly;
    emit(barrier_arrive);
}

void Decoder::decode_bulk() {
    if (!modifiers_.take("async") || !modifiers_.take("bulk")) modifiers_.fail();
    builder_.kernel().uses_async_proxy = true;
    if (modifiers_.take("commit_group")) return emit(bulk_commit);
    if (modifiers_.take("wait_group")) {
        out_.variant = modifiers_.take("read");
        read(operand(0));
        return emit(bulk_wait);
    }
    const bool hint = modifiers_.take("L2::cache_hint");
    if (statement_.opcode.find("bulk_group") != std::string::npos) {
        modifiers_.take("bulk_group");
        if (!modifiers_.take("global") || !modifiers_.take("shared::cta")) modifiers_.fail();
        expect_operands(3, hint ? 4 : 3);
        read_plain_address(operand(0));
        read_plain_address(operand(1));
        read(operand(2));
        return emit(bulk_store);
    }
    if (!modifiers_.take("mbarrier::complete_tx::bytes") || !modifiers_.take("global"))
        modifiers_.fail();
    if (!modifiers_.take("shared::cluster") && !modifiers_.take("shared::cta")) modifiers_.fail();
    expect_operands(4, hint ? 5 : 4);
    read_plain_address(operand(0));
    read_plain_address(operand(1));
    read(operand(2));
    read_plain_address(operand(3));
    emit(bulk_load);
}

}  // namespace

void decode(KernelBuilder& builder, const Statement& statement) {
    Decoder(builder, statement).run();
}

}  // namespace ptx
