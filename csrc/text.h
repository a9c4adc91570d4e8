// A string as an argument of an operator.
//
// torch's own conversion to std::string makes one with `new`, returns a copy and keeps the first (its headers of 2.10 to 2.13): each
// call of an operator would lose 48 bytes for every string. Small blocks that stay between large results that go keep the heap from
// using their place again, so that a process grew by a result for each call.
#pragma once
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/stableivalue_conversions.h>

#include <string>
#include <utility>

namespace bigmodel {

struct Text : std::string {
  using std::string::string;
  Text(std::string text) : std::string(std::move(text)) {}
};

}  // namespace bigmodel

namespace torch::stable::detail {

template <>
struct ToImpl<bigmodel::Text> {
  static bigmodel::Text call(StableIValue value, [[maybe_unused]] uint64_t extension_build_version, [[maybe_unused]] bool is_internal) {
    StringHandle handle = torch::stable::detail::to<StringHandle>(value);
    size_t length = 0;
    const char* data = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    bigmodel::Text text(data, length);
    STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return text;
  }
};

}  // namespace torch::stable::detail
