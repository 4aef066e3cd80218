#include <ATen/ATen.h>

#include <budwood/peft/ops/kept.h>
#include <budwood/quant/error.h>
#include <array>
#include <optional>

namespace budwood::ops {
namespace {

thread_local at::ScalarType kept_now = at::kFloat;

// Values that were kept a moment ago: a gate is kept by its projection and by its activation.
struct Recent {
  c10::weak_intrusive_ptr<c10::StorageImpl> storage;
  int64_t offset, version;
  bool exact;
  c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl> rounded;
};
constexpr size_t kRemembered = 8;
thread_local std::array<std::optional<Recent>, kRemembered> remembered;
thread_local size_t next_place = 0;

bool can_be_remembered(const at::Tensor& t) {
  return t.is_contiguous() && !t.is_inference();
}

void remember(const at::Tensor& t, bool exact, const at::Tensor& rounded) {
  remembered[next_place++ % kRemembered] =
      Recent{t.storage().getWeakStorageImpl(), t.storage_offset(),
             static_cast<int64_t>(t._version()), exact,
             c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>(
                 rounded.getIntrusivePtr())};
}

}  // namespace

ScopedKeptType::ScopedKeptType(at::ScalarType type) : before_(kept_now) {
  set_kept_type(type);
}

ScopedKeptType::~ScopedKeptType() {
  kept_now = before_;
}

void set_kept_type(at::ScalarType type) {
  if (type != at::kFloat && type != at::kBFloat16)
    throw Error("activations",
                std::string("are kept in float32 or bfloat16, not in ") + c10::toString(type));
  kept_now = type;
}

at::ScalarType kept_type(at::ScalarType type) {
  return type == at::kFloat ? kept_now : type;
}

at::Tensor keep(const at::Tensor& activation) {
  if (!activation.defined() || activation.dim() < 2 || activation.is_meta() ||
      kept_type(activation.scalar_type()) == activation.scalar_type())
    return activation;
  const auto plain = activation.detach();
  if (!can_be_remembered(plain)) return plain.to(kept_now);
  const auto storage = plain.storage().getWeakStorageImpl();
  for (const auto& entry : remembered) {
    if (!entry || entry->storage != storage || entry->offset != plain.storage_offset() ||
        entry->version != plain._version())
      continue;
    if (entry->exact) return activation;
    const auto rounded = at::Tensor(entry->rounded.lock());
    if (rounded.defined() && rounded.numel() == plain.numel()) return rounded.view(plain.sizes());
  }
  auto rounded = plain.to(kept_now);
  remember(plain, false, rounded);
  return rounded;
}

void keep_exactly(const at::Tensor& activation) {
  if (kept_type(activation.scalar_type()) == activation.scalar_type()) return;
  const auto plain = activation.detach();
  if (can_be_remembered(plain)) remember(plain, true, plain);
}

at::Tensor restored(const at::Tensor& kept, at::ScalarType type) {
  return kept.defined() ? kept.to(type) : kept;
}

}  // namespace budwood::ops
