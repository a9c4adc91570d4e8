// How libFuzzer changes an input: one time in three as it does any bytes. But these bytes are choices, each of which decides what the
// next ones stand for, and small changes of what is there come slowly to other calls. So, else, all that follows a place is drawn
// anew: from the beginning, where the input is then as any that hypothesis draws; or behind choices that have reached something.
// Only bytes that a call has drawn count: a change behind them changes nothing.
#include <cstddef>
#include <cstdint>
#include <random>
#include <string_view>
#include <unordered_map>

namespace {

std::unordered_map<size_t, size_t> bytes_drawn;  // of the inputs that have been run, by their hash

size_t hash(const uint8_t* data, size_t size) { return std::hash<std::string_view>()({reinterpret_cast<const char*>(data), size}); }

}  // namespace

extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t most);

extern "C" void LLVMFuzzerBytesDrawn(const uint8_t* data, size_t size, size_t drawn) { bytes_drawn[hash(data, size)] = drawn; }

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t most, unsigned seed) {
  std::mt19937 random(seed);
  const auto known = bytes_drawn.find(hash(data, size));
  if (known != bytes_drawn.end() && known->second < size) size = known->second;
  if (random() % 3 == 0) return LLVMFuzzerMutate(data, size, most);
  const size_t from = random() % 2 ? 0 : random() % (size + 1);
  for (size_t i = from; i < most; i++) data[i] = uint8_t(random());
  return most;
}
