// Decoding of everything that touches memory.
#include "decoder.h"

namespace ptx {

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

}  // namespace ptx
