// Any bytes are a safetensors file that is read, or an Error.
#include <budwood/peft/io/safetensors.h>
#include <budwood/quant/error.h>

#include <cstddef>
#include <cstdint>

using namespace budwood::io;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try {
    const auto file = SafetensorsFile::parse(
        MappedFile::copy_of({reinterpret_cast<const char*>(data), size}, "fuzz"));
    volatile unsigned sum = 0;
    for (const auto& tensor : file.tensors()) {
      if (file.find(tensor.name) != &tensor) __builtin_trap();
      for (uint64_t i = 0; i < tensor.bytes(); ++i)
        sum = sum + std::to_integer<unsigned>(tensor.data[i]);
    }
  } catch (const budwood::Error&) {
  }
  return 0;
}
