#include <ATen/ATen.h>

#include <budwood/peft/models/kv_cache.h>

namespace budwood::models {
namespace {

at::Tensor grown(const at::Tensor& store, const at::Tensor& fresh, int64_t used, int64_t needed) {
  if (store.defined() && store.size(1) >= needed) return store;
  auto sizes = fresh.sizes().vec();
  sizes[1] = std::max<int64_t>(needed, store.defined() ? 2 * store.size(1) : 64);
  auto larger = at::empty(sizes, fresh.options());
  if (used > 0) larger.narrow(1, 0, used).copy_(store.narrow(1, 0, used));
  return larger;
}

}  // namespace

std::pair<at::Tensor, at::Tensor> KvCache::append(int64_t layer, const at::Tensor& k,
                                                  const at::Tensor& v) {
  if (store_.empty()) store_.resize(static_cast<size_t>(layers_));
  auto& own = store_.at(static_cast<size_t>(layer));
  const int64_t needed = length_ + k.size(1);
  own.k = grown(own.k, k, length_, needed);
  own.v = grown(own.v, v, length_, needed);
  own.k.narrow(1, length_, k.size(1)).copy_(k);
  own.v.narrow(1, length_, v.size(1)).copy_(v);
  return {own.k.narrow(1, 0, needed), own.v.narrow(1, 0, needed)};
}

}  // namespace budwood::models
