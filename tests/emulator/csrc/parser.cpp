// PTX text to kernels: directives here, instructions in decoder.cpp.
#include <algorithm>

#include "builder.h"
#include "lexer.h"

namespace ptx {
namespace {

const std::map<std::string, int> kTypeBytes{
    {".pred", 1}, {".b8", 1},  {".u8", 1},  {".s8", 1},  {".b16", 2},  {".u16", 2},
    {".s16", 2},  {".f16", 2}, {".b32", 4}, {".u32", 4}, {".s32", 4},  {".f32", 4},
    {".b64", 8},  {".u64", 8}, {".s64", 8}, {".f64", 8}, {".f16x2", 4}};

class Parser {
 public:
    explicit Parser(const std::string& text)
        : tokens_(tokenise(text)), module_(std::make_shared<Module>()) {}

    std::shared_ptr<Module> run() {
        while (peek().kind != Token::kEnd) parse_top_level();
        return module_;
    }

 private:
    struct Declaration {
        std::string name;
        u64 num_bytes = 0, alignment = 1;
        bool is_array = false, is_open = false;  // name[]
        int element_bytes = 1;
    };

    const Token& peek(int ahead = 0) const {
        return tokens_[std::min(at_ + size_t(i64(ahead)), tokens_.size() - 1)];
    }
    const Token& next() { return tokens_[std::min(at_++, tokens_.size() - 1)]; }
    bool take(const char* what) {
        if (!peek().is(what)) return false;
        ++at_;
        return true;
    }
    [[noreturn]] void fail(const std::string& what) const { throw ParseError(peek().line, what); }
    void expect(const char* what) {
        if (!take(what)) fail(std::string("expected '") + what + "', got '" + peek().text + "'");
    }
    std::string word() {
        if (peek().kind != Token::kWord) fail("expected a name, got '" + peek().text + "'");
        return next().text;
    }
    u64 number() {
        std::string text = take("-") ? "-" : "";
        text += next().text;
        return parse_number(text, peek(-1).line);
    }
    /// Skip the rest of the line that the last token lies on.
    void skip_line() {
        const int line = peek(-1).line;
        while (peek().kind != Token::kEnd && peek().line == line) ++at_;
    }
    void skip_braces() {
        int depth = 0;
        do {
            if (peek().kind == Token::kEnd) fail("expected '}', got the end of the text");
            if (peek().is("{")) ++depth;
            if (peek().is("}")) --depth;
            ++at_;
        } while (depth > 0);
    }

    void parse_top_level();
    void parse_entry();
    void parse_parameters(Kernel& kernel);
    void parse_body(KernelBuilder& builder);
    void parse_directive(KernelBuilder& builder);
    void parse_registers(KernelBuilder& builder);
    void parse_location();
    Declaration parse_declaration();
    void parse_variable(bool is_constant);
    void parse_instruction(KernelBuilder& builder);
    Operand parse_operand();
    void parse_extern();

    std::vector<Token> tokens_;
    size_t at_ = 0;
    std::shared_ptr<Module> module_;
    std::map<Location, int> location_numbers_;
    int location_ = 0;
    std::vector<Declaration> shared_variables_;
};

void Parser::parse_top_level() {
    const Token& token = peek();
    if (token.is(".version") || token.is(".address_size")) {
        ++at_;
        skip_line();
    } else if (token.is(".target")) {
        ++at_;
        module_->target = word();
        skip_line();
    } else if (token.is(".file")) {
        ++at_;
        const i32 file = i32(number());
        module_->files[file] = next().text;
        skip_line();
    } else if (token.is(".section")) {
        while (!peek().is("{")) ++at_;
        skip_braces();
    } else if (token.is(".visible") || token.is(".weak")) {
        ++at_;
    } else if (token.is(".extern")) {
        parse_extern();
    } else if (token.is(".entry")) {
        parse_entry();
    } else if (token.is(".global") || token.is(".const")) {
        parse_variable(next().is(".const"));
    } else if (token.is(".shared")) {
        ++at_;
        shared_variables_.push_back(parse_declaration());
        expect(";");
    } else {
        fail("unsupported directive '" + token.text + "'");
    }
}

void Parser::parse_extern() {
    expect(".extern");
    if (take(".shared")) {
        shared_variables_.push_back(parse_declaration());
        if (!shared_variables_.back().is_open)
            fail("unsupported extern shared variable with a size");
        expect(";");
        return;
    }
    if (!take(".func")) fail("unsupported extern '" + peek().text + "'");
    if (take("("))
        while (!take(")")) ++at_;
    module_->externs.push_back(word());
    while (!take(";")) {
        if (peek().is("{") || peek().kind == Token::kEnd)
            fail("expected ';' after an extern function");
        ++at_;
    }
}

Parser::Declaration Parser::parse_declaration() {
    Declaration declaration;
    for (;;) {
        if (take(".align")) {
            declaration.alignment = number();
        } else if (take(".visible") || take(".ptr") || take(".global") || take(".shared")) {
            continue;  // attributes of pointers; nothing here depends on them
        } else if (const auto type = kTypeBytes.find(peek().text); type != kTypeBytes.end()) {
            declaration.element_bytes = type->second;
            declaration.alignment = std::max<u64>(declaration.alignment, u64(type->second));
            ++at_;
        } else {
            break;
        }
    }
    declaration.name = word();
    u64 count = 1;
    while (take("[")) {
        declaration.is_array = true;
        if (take("]")) {
            declaration.is_open = true;
            continue;
        }
        count *= number();
        expect("]");
    }
    declaration.num_bytes = declaration.is_open ? 0 : count * u64(declaration.element_bytes);
    return declaration;
}

void Parser::parse_variable(bool) {
    const Declaration declaration = parse_declaration();
    GlobalVariable variable{declaration.num_bytes, declaration.alignment,
                            std::vector<u8>(declaration.num_bytes)};
    if (take("=")) {
        size_t position = 0;
        const bool braces = take("{");
        while (!peek().is(";") && !peek().is("}")) {
            const u64 value = number();
            for (int byte = 0; byte < declaration.element_bytes; ++byte, ++position) {
                if (position >= variable.initial.size())
                    fail("more values than '" + declaration.name + "' holds");
                variable.initial[position] = u8(value >> (8 * byte));
            }
            take(",");
        }
        if (braces) expect("}");
    }
    expect(";");
    module_->variables[declaration.name] = std::move(variable);
}

void Parser::parse_parameters(Kernel& kernel) {
    expect("(");
    while (!take(")")) {
        expect(".param");
        const Declaration parameter = parse_declaration();
        const u64 alignment = parameter.alignment;
        kernel.parameter_bytes =
            u32((kernel.parameter_bytes + alignment - 1) / alignment * alignment);
        kernel.parameters.push_back(
            {parameter.name, kernel.parameter_bytes, u32(parameter.num_bytes)});
        kernel.parameter_bytes += u32(parameter.num_bytes);
        take(",");
    }
}

void Parser::parse_entry() {
    expect(".entry");
    auto kernel = std::make_shared<Kernel>();
    kernel->name = word();
    if (peek().is("(")) parse_parameters(*kernel);
    while (!peek().is("{")) {  // .maxntid 256, 1, 1 and the like: hints to ptxas
        if (!peek().is(".maxntid") && !peek().is(".minnctapersm") && !peek().is(".maxnreg") &&
            !peek().is(".reqntid"))
            fail("unsupported directive '" + peek().text + "'");
        ++at_;
        skip_line();
    }
    KernelBuilder builder(*module_, kernel);
    builder.open_scope();
    for (const Declaration& variable : shared_variables_) {
        if (variable.is_open)
            builder.declare_dynamic_shared(variable.name);
        else
            builder.offer_shared(variable.name, variable.num_bytes, variable.alignment);
    }
    parse_body(builder);
    builder.finish(peek().line);
    module_->kernels[kernel->name] = kernel;
}

void Parser::parse_body(KernelBuilder& builder) {
    expect("{");
    for (int depth = 1; depth > 0;) {
        if (take("{")) {
            builder.open_scope();
            ++depth;
        } else if (take("}")) {
            if (--depth > 0) builder.close_scope();
        } else if (peek().kind == Token::kWord && peek(1).is(":")) {
            const std::string label = word();
            expect(":");
            if (take(".branchtargets")) {
                std::vector<std::string> labels;
                do labels.push_back(word());
                while (take(","));
                expect(";");
                builder.declare_branch_table(label, labels);
            } else {
                builder.place_label(label, peek().line);
            }
        } else if (peek().kind == Token::kEnd) {
            fail("expected '}', got the end of the text");
        } else if (peek().kind == Token::kWord && peek().text[0] == '.') {
            parse_directive(builder);
        } else if (!take(";")) {
            parse_instruction(builder);
        }
    }
}

void Parser::parse_directive(KernelBuilder& builder) {
    if (peek().is(".loc")) {
        parse_location();
    } else if (take(".pragma")) {
        while (!take(";")) ++at_;
    } else if (take(".reg")) {
        parse_registers(builder);
    } else if (take(".shared")) {
        const Declaration variable = parse_declaration();
        expect(";");
        builder.declare_shared(variable.name, variable.num_bytes, variable.alignment);
    } else if (take(".local")) {
        const Declaration variable = parse_declaration();
        expect(";");
        builder.declare_local(variable.name, variable.num_bytes, variable.alignment);
    } else if (take(".param")) {  // an argument or result of a call; held in a register
        const Declaration variable = parse_declaration();
        expect(";");
        if (variable.is_array) fail("unsupported call with arguments by value in memory");
        builder.declare_register(variable.name, variable.element_bytes * 8);
    } else {
        fail("unsupported directive '" + peek().text + "'");
    }
}

void Parser::parse_registers(KernelBuilder& builder) {
    const auto type = kTypeBytes.find(word());
    if (type == kTypeBytes.end()) fail("unsupported register type");
    const int bits = type->second * 8;
    do {
        const std::string name = word();
        if (take("<")) {
            const u64 count = number();
            expect(">");
            for (u64 i = 0; i < count; ++i)
                builder.declare_register(name + std::to_string(i), bits);
        } else {
            builder.declare_register(name, bits);
        }
    } while (take(","));
    expect(";");
}

void Parser::parse_location() {
    const int line = peek().line;
    expect(".loc");
    Location location;
    location.file = i32(number());
    location.line = i32(number());
    while (peek().line == line && peek().kind != Token::kEnd) {
        if (take("inlined_at")) {
            location.outer_file = i32(number());
            location.outer_line = i32(number());
        } else {
            ++at_;
        }
    }
    const auto [place, is_new] =
        location_numbers_.try_emplace(location, int(module_->locations.size()));
    if (is_new) module_->locations.push_back(location);
    // Line 0 marks code of no line; the line before says more.
    if (location.line != 0) location_ = place->second;
}

Operand Parser::parse_operand() {
    Operand operand;
    operand.negated = take("!");
    if (take("{") || take("(")) {
        const char* end = peek(-1).is("{") ? "}" : ")";
        operand.kind = *end == '}' ? Operand::kVector : Operand::kList;
        while (!take(end)) {
            operand.parts.push_back(parse_operand());
            take(",");
        }
    } else if (take("[")) {
        operand.kind = Operand::kAddress;
        operand.parts.push_back(parse_operand());
        operand.offset = operand.parts[0].offset;
        operand.parts[0].offset = 0;
        expect("]");
    } else if (peek().kind == Token::kNumber || peek().is("-")) {
        operand.kind = Operand::kNumber;
        operand.text = take("-") ? "-" : "";
        operand.text += next().text;
    } else {
        operand.text = word();
        if (take("|")) {
            Operand first = operand;
            operand = {.kind = Operand::kPair, .text = "", .parts = {first, parse_operand()}};
        } else if (take("+")) {
            operand.offset = i64(number());
        } else if (peek().is("-")) {
            operand.offset = i64(number());
        }
    }
    return operand;
}

void Parser::parse_instruction(KernelBuilder& builder) {
    Statement statement;
    statement.line = peek().line;
    statement.location = location_;
    if (take("@")) {
        statement.negated = take("!");
        statement.predicate = word();
    }
    statement.opcode = word();
    while (!take(";")) {
        if (peek().is("}") || peek().kind == Token::kEnd)
            fail("expected ';' after '" + statement.opcode + "', got '" + peek().text + "'");
        statement.operands.push_back(parse_operand());
        if (!take(",") && !peek().is(";")) fail("expected ',' or ';', got '" + peek().text + "'");
    }
    decode(builder, statement);
}

}  // namespace

std::shared_ptr<Module> parse(const std::string& text) { return Parser(text).run(); }

std::string Module::describe(const Instruction& instruction) const {
    const Location& where = locations.at(size_t(instruction.location));
    const auto name = [&](i32 file) {
        const auto found = files.find(file);
        if (found == files.end()) return std::string("?");
        return found->second.substr(found->second.find_last_of('/') + 1);
    };
    if (where.line == 0) return "";
    std::string text = name(where.file) + ":" + std::to_string(where.line);
    if (where.outer_line != 0)
        text += " in " + name(where.outer_file) + ":" + std::to_string(where.outer_line);
    return text;
}

}  // namespace ptx
