#include "lexer.h"

#include <cctype>

#include "ptx.h"

namespace ptx {
namespace {

bool starts_word(char c) {
    return std::isalpha(static_cast<u8>(c)) || c == '_' || c == '$' || c == '%' || c == '.';
}
bool continues_word(char c) { return starts_word(c) || std::isdigit(static_cast<u8>(c)); }

/// The index behind the comment that starts at `at`, or `at` when none does.
size_t skip_comment(const std::string& text, size_t at, int& line) {
    if (text.compare(at, 2, "//") == 0) {
        while (at < text.size() && text[at] != '\n') ++at;
    } else if (text.compare(at, 2, "/*") == 0) {
        const size_t end = text.find("*/", at + 2);
        if (end == std::string::npos) throw ParseError(line, "comment without an end");
        for (; at < end + 2; ++at) line += text[at] == '\n';
    }
    return at;
}

}  // namespace

std::vector<Token> tokenise(const std::string& text) {
    std::vector<Token> tokens;
    int line = 1;
    size_t at = 0;
    while (at < text.size()) {
        const char c = text[at];
        if (c == '\n') ++line;
        if (std::isspace(static_cast<u8>(c)) || c == '\0') {
            ++at;
            continue;
        }
        if (const size_t behind = skip_comment(text, at, line); behind != at) {
            at = behind;
            continue;
        }
        size_t end = at + 1;
        Token::Kind kind = Token::kMark;
        if (c == '"') {
            kind = Token::kString;
            end = text.find('"', at + 1);
            if (end == std::string::npos) throw ParseError(line, "string without an end");
            tokens.push_back({kind, text.substr(at + 1, end - at - 1), line});
            at = end + 1;
            continue;
        }
        if (std::isdigit(static_cast<u8>(c))) {
            kind = Token::kNumber;
            while (end < text.size() &&
                   (std::isalnum(static_cast<u8>(text[end])) || text[end] == '.'))
                ++end;
        } else if (starts_word(c)) {
            kind = Token::kWord;
            // "::" is part of words such as shared::cta; a single colon ends a label.
            while (end < text.size()) {
                if (continues_word(text[end]))
                    ++end;
                else if (text.compare(end, 2, "::") == 0)
                    end += 2;
                else
                    break;
            }
        }
        tokens.push_back({kind, text.substr(at, end - at), line});
        at = end;
    }
    tokens.push_back({Token::kEnd, "", line});
    return tokens;
}

}  // namespace ptx
