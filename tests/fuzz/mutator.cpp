// How libFuzzer changes an input: one time in three as it does any bytes. But these bytes are choices, each of which decides what the
// next ones stand for, and small changes of what is there come slowly to other calls. So, else, all that follows a place is drawn
// anew: from the beginning, where the input is then as any that hypothesis draws; or behind choices that have reached something.
#include <cstddef>
#include <cstdint>
#include <random>

extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t most);

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t most, unsigned seed) {
  std::mt19937 random(seed);
  if (random() % 3 == 0) return LLVMFuzzerMutate(data, size, most);
  const size_t from = random() % 2 ? 0 : random() % (size + 1);
  for (size_t i = from; i < most; i++) data[i] = uint8_t(random());
  return most;
}
