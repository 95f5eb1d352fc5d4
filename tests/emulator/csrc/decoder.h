#pragma once
// Statements to instructions. What no function here takes from a statement is an error.
#include <algorithm>

#include "builder.h"
#include "forms.h"
#include "handlers.h"

namespace ptx {

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
inline TypeInfo take_type(Modifiers& modifiers) {
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

}  // namespace ptx
