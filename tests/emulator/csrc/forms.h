#pragma once
// The allow-list of instructions that only compute: full opcode text -> handler.
#include <string>
#include <unordered_map>

#include "ptx.h"

namespace ptx {

struct Form {
    Handler handler = nullptr;
    int num_sources = 0;
    u8 variant = 0;
    bool copies = false;  // passes undefined values on
};
using Forms = std::unordered_map<std::string, Form>;

const Forms& computing_forms();

// The parts of the table; each lives in the file of its name.
void add_integer_forms(Forms& forms);
void add_float_forms(Forms& forms);
void add_comparison_forms(Forms& forms);
void add_conversion_forms(Forms& forms);

}  // namespace ptx
