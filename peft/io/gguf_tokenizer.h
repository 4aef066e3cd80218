#pragma once

#include <budwood/peft/io/gguf.h>

#include <filesystem>
#include <map>
#include <string>
#include <vector>

/// The tokeniser that a GGUF file carries in its metadata, to and from the files Hugging Face
/// loads.
namespace budwood::io {

/// File name -> content: tokenizer.json, tokenizer_config.json (with the chat template),
/// special_tokens_map.json, and generation_config.json when the file names special ids.
///
/// For byte-level BPE (tokenizer.ggml.model "gpt2") with the pre-tokenisers of
/// gguf_pre_tokenizers(); anything else is an Error that lists what is supported. Text is split as
/// the original model's tokeniser splits it, which tokenizer.ggml.pre names. BOS and EOS are added
/// where the file says so (BOS also for "llama-bpe" files that do not say).
std::map<std::string, std::string> tokenizer_files(const GgufFile& file);

/// Writes tokenizer_files() into an existing folder.
void write_tokenizer(const GgufFile& file, const std::filesystem::path& folder);

/// Supported values of tokenizer.ggml.pre.
std::vector<std::string> gguf_pre_tokenizers();

struct TokenizerMetadata {
  GgufMetadata keys;                  ///< "tokenizer.*"
  std::vector<std::string> warnings;  ///< what a GGUF file cannot say of this tokeniser
};

/// A tokeniser as keys of a GGUF file, for a model whose token table has `vocabulary` rows. `from`:
///   a GGUF file   its keys as they are, of any kind of tokeniser;
///   a folder      byte-level BPE from tokenizer.json, tokenizer_config.json and the chat template.
///                 Any other kind is an Error that says what was found;
///   empty         tokenizer.ggml.model "no_vocab".
/// Rows without a token get placeholders "[PAD<id>]"; a token without a row is an Error.
TokenizerMetadata tokenizer_metadata(const std::filesystem::path& from, int64_t vocabulary);

}  // namespace budwood::io
