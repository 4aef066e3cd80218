// Any bytes are a GGUF file that is read, its tokeniser with it, or an Error.
#include <budwood/peft/io/gguf.h>
#include <budwood/peft/io/gguf_tokenizer.h>
#include <budwood/quant/error.h>

#include <cstddef>
#include <cstdint>

using namespace budwood::io;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try {
    const auto file =
        GgufFile::parse(MappedFile::copy_of({reinterpret_cast<const char*>(data), size}, "fuzz"));
    volatile unsigned sum = 0;
    for (const auto& tensor : file.tensors()) {
      if (file.find(tensor.name) != &tensor) __builtin_trap();
      for (uint64_t i = 0; i < tensor.bytes; ++i)
        sum = sum + std::to_integer<unsigned>(tensor.data[i]);
    }
    if (file.has("tokenizer.ggml.model")) tokenizer_files(file);
  } catch (const budwood::Error&) {
  }
  return 0;
}
