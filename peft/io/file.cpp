#include <budwood/peft/io/file.h>
#include <budwood/peft/io/staging.h>
#include <budwood/quant/error.h>
#include <errno.h>
#include <fcntl.h>
#include <fmt/format.h>

#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <algorithm>

#include <cstring>
#include <utility>

namespace budwood::io {
namespace fs = std::filesystem;
namespace {

// A descriptor of a regular file and its size.
struct OpenFile {
  int fd = -1;
  uint64_t size = 0;
  ~OpenFile() {
    if (fd >= 0) ::close(fd);
  }
};

void open_regular(const fs::path& path, std::string_view where, OpenFile& file) {
  // O_NONBLOCK: opening a pipe must not wait for its writer.
  file.fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (file.fd < 0) fail_errno(where, "open", path, errno);
  struct stat status = {};
  if (::fstat(file.fd, &status) != 0) fail_errno(where, "read the size of", path, errno);
  if (S_ISDIR(status.st_mode))
    throw Error(where, fmt::format("{} is a folder, a file is needed", path.string()));
  if (!S_ISREG(status.st_mode))
    throw Error(where, fmt::format("{} is not a regular file", path.string()));
  file.size = static_cast<uint64_t>(status.st_size);
}

}  // namespace

std::shared_ptr<MappedFile> MappedFile::open(const fs::path& path) {
  OpenFile file;
  open_regular(path, "MappedFile", file);
  if (file.size > SIZE_MAX)
    throw Error("MappedFile", fmt::format("{} is too large to map", path.string()));
  std::shared_ptr<MappedFile> mapped(new MappedFile);
  mapped->path_ = path;
  if (file.size > 0) {
    // NORESERVE: a copy-on-write mapping larger than memory is refused without it.
    void* data =
        ::mmap(nullptr, file.size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, file.fd, 0);
    if (data == MAP_FAILED) fail_errno("MappedFile", "map", path, errno);
    mapped->data_ = static_cast<std::byte*>(data);
    mapped->size_ = file.size;
  }
  return mapped;
}

std::shared_ptr<MappedFile> MappedFile::copy_of(std::string_view bytes, const std::string& name) {
  std::shared_ptr<MappedFile> file(new MappedFile);
  file->path_ = name;
  if (!bytes.empty()) {
    file->owned_ = std::make_unique_for_overwrite<std::byte[]>(bytes.size());
    std::memcpy(file->owned_.get(), bytes.data(), bytes.size());
    file->data_ = file->owned_.get();
    file->size_ = bytes.size();
  }
  return file;
}

MappedFile::~MappedFile() {
  if (data_ != nullptr && !owned_) ::munmap(data_, size_);
}

void MappedFile::release(const std::byte* begin, size_t bytes) const {
  if (owned_ || bytes == 0) return;
  static const auto page = static_cast<uintptr_t>(::sysconf(_SC_PAGESIZE));
  // Pages that are shared with a neighbour stay.
  const auto first = (reinterpret_cast<uintptr_t>(begin) + page - 1) / page * page;
  const auto last = (reinterpret_cast<uintptr_t>(begin) + bytes) / page * page;
  if (first < last) ::madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
}

RandomFile::RandomFile(const fs::path& path) : path_(path) {
  OpenFile file;
  open_regular(path, "RandomFile", file);
  descriptor_ = std::exchange(file.fd, -1);
  size_ = file.size;
}

RandomFile::RandomFile(RandomFile&& other) noexcept
    : path_(std::move(other.path_)),
      descriptor_(std::exchange(other.descriptor_, -1)),
      size_(other.size_) {}

RandomFile::~RandomFile() {
  if (descriptor_ >= 0) ::close(descriptor_);
}

void RandomFile::read(uint64_t begin, void* to, size_t bytes) const {
  if (begin > size_ || bytes > size_ - begin)
    throw Error("RandomFile", fmt::format("{} holds {} bytes, those from {} to {} were asked for",
                                          path_.string(), size_, begin, begin + bytes));
  auto* out = static_cast<std::byte*>(to);
  for (size_t done = 0; done < bytes;) {
    const ssize_t n =
        ::pread(descriptor_, out + done, bytes - done, static_cast<off_t>(begin + done));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) fail_errno("RandomFile", "read", path_, errno);
    if (n == 0)
      throw Error("RandomFile", fmt::format("{} became shorter while it was read: it ends at byte "
                                            "{}",
                                            path_.string(), begin + done));
    done += static_cast<size_t>(n);
  }
}

std::string read_file(const fs::path& path, uint64_t max_bytes) {
  OpenFile file;
  open_regular(path, "read_file", file);
  if (file.size > max_bytes)
    throw Error("read_file", fmt::format("{} holds {} bytes, at most {} are expected",
                                         path.string(), file.size, max_bytes));
  std::string text(file.size, '\0');
  size_t done = 0;
  while (done < text.size()) {
    const ssize_t n = ::read(file.fd, text.data() + done, text.size() - done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) fail_errno("read_file", "read", path, errno);
    if (n == 0)
      throw Error("read_file", fmt::format("{} ended after {} of {} bytes while it was read",
                                           path.string(), done, text.size()));
    done += static_cast<size_t>(n);
  }
  return text;
}

void require_apart(std::string_view where, const std::filesystem::path& out,
                   const std::vector<std::filesystem::path>& read) {
  const auto to = std::filesystem::weakly_canonical(out);
  for (const auto& path : read) {
    if (path.empty()) continue;
    const auto from = std::filesystem::weakly_canonical(path);
    if (std::mismatch(to.begin(), to.end(), from.begin(), from.end()).first == to.end())
      throw Error(where, fmt::format("{} is, or holds, {}, which is read: choose another name",
                                     out.string(), path.string()));
  }
}

}  // namespace budwood::io
