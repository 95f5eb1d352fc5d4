#pragma once
// Structs of kernel arguments as Python sees them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <iterator>
#include <type_traits>
#include <vector>

#include "core/errors.h"
#include "cuda/protocol.h"

namespace ep::cuda {

namespace py = pybind11;

/// A struct of kernel arguments whose fields Python sets by name: addresses are integers, an
/// address or number per rank is a list.
template <class Args>
class Fields {
 public:
    Fields(py::module_& m, const char* name) : class_(m, name) {
        class_.def(py::init([](const py::kwargs& fields) {
            Args args{};
            py::object view = py::cast(&args, py::return_value_policy::reference);
            for (const auto& [field, value] : fields) py::setattr(view, field, value);
            return args;
        }));
    }

    template <class Value>
        requires(!std::is_pointer_v<Value> && !std::is_array_v<Value>)
    Fields& add(const char* name, Value Args::* field) {
        class_.def_readwrite(name, field);
        return *this;
    }

    template <class T>
    Fields& add(const char* name, T* Args::* field) {
        class_.def_property(
            name, [field](const Args& args) { return reinterpret_cast<uintptr_t>(args.*field); },
            [field](Args& args, uintptr_t address) {
                args.*field = reinterpret_cast<T*>(address);
            });
        return *this;
    }

    template <class T>
    Fields& add(const char* name, T* (Args::*field)[kMaxRanks]) {
        class_.def_property(
            name,
            [field](const Args& args) {
                std::vector<uintptr_t> addresses;
                for (T* address : args.*field)
                    addresses.push_back(reinterpret_cast<uintptr_t>(address));
                return addresses;
            },
            [field, name](Args& args, const std::vector<uintptr_t>& addresses) {
                check_size(name, addresses.size(), kMaxRanks);
                for (size_t rank = 0; rank < addresses.size(); ++rank)
                    (args.*field)[rank] = reinterpret_cast<T*>(addresses[rank]);
            });
        return *this;
    }

    /// A number per rank, or of whatever else there is one of.
    template <class T, size_t kMost>
        requires(!std::is_pointer_v<T>)
    Fields& add(const char* name, T (Args::*field)[kMost]) {
        class_.def_property(
            name,
            [field](const Args& args) {
                return std::vector<T>(std::begin(args.*field), std::end(args.*field));
            },
            [field, name](Args& args, const std::vector<T>& values) {
                check_size(name, values.size(), kMost);
                std::copy(values.begin(), values.end(), args.*field);
            });
        return *this;
    }

    py::class_<Args>& python_class() { return class_; }

 private:
    static void check_size(const char* name, size_t num_values, size_t most) {
        if (num_values > most)
            throw std::invalid_argument(
                text(name, ": expected at most ", most, " values, got ", num_values));
    }

    py::class_<Args> class_;
};

}  // namespace ep::cuda
