#pragma once
// PTX text as tokens.
#include <string>
#include <vector>

namespace ptx {

struct Token {
    enum Kind { kWord, kNumber, kString, kMark, kEnd } kind = kEnd;
    std::string text;
    int line = 0;
    bool is(const char* what) const { return text == what && kind != kString; }
};

std::vector<Token> tokenise(const std::string& text);

}  // namespace ptx
