#include <budwood/peft/io/file.h>
#include <budwood/quant/error.h>
#include <doctest/doctest.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stddef.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <random>

#include "temporary_folder.h"

using namespace budwood;
using namespace budwood::io;
using namespace budwood::io::testing;
namespace fs = std::filesystem;

namespace {

// Runs `body` in a forked child and returns its exit code (0 = body returned true).
template <typename F>
int in_child(F&& body) {
  const pid_t child = ::fork();
  if (child == 0) {
    int code = 2;
    try {
      code = body() ? 0 : 1;
    } catch (...) {
    }
    ::_exit(code);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

// Makes the system call renameat2 fail as it does on file systems without its flags.
bool forbid_renameat2() {
  sock_filter code[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_renameat2, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EINVAL),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  sock_fprog program = {4, code};
  return ::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 &&
         ::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0;
}

// Two files that belong together: both hold the same text.
void save_pair(const fs::path& target, const std::string& text, Existing existing) {
  AtomicFolder folder(target, existing);
  write_file(folder.path() / "a", text);
  write_file(folder.path() / "b", text);
  folder.commit();
}

// Kills a child that runs `save` in a loop, many times at random moments; `check` after each.
template <typename Save, typename Check>
void kill_at_random(int rounds, Save&& save, Check&& check) {
  std::mt19937 random(7);
  for (int round = 0; round < rounds; ++round) {
    const pid_t child = ::fork();
    if (child == 0) {
      for (int i = 0;; ++i) save(i);
    }
    ::usleep(std::uniform_int_distribution<useconds_t>(500, 15000)(random));
    ::kill(child, SIGKILL);
    ::waitpid(child, nullptr, 0);
    check();
  }
}

}  // namespace

TEST_CASE("a mapped file shows the file's bytes and keeps writes to itself") {
  TemporaryFolder folder;
  spill(folder / "x", "hello");
  const auto file = MappedFile::open(folder / "x");
  REQUIRE(file->size() == 5);
  CHECK(std::string(reinterpret_cast<const char*>(file->data()), 5) == "hello");
  file->data()[0] = std::byte{'J'};
  CHECK(slurp(folder / "x") == "hello");
  CHECK(read_file(folder / "x") == "hello");
  CHECK(file->path() == folder / "x");
}

TEST_CASE("an empty file can be mapped and read") {
  TemporaryFolder folder;
  spill(folder / "x", "");
  CHECK(MappedFile::open(folder / "x")->size() == 0);
  CHECK(read_file(folder / "x").empty());
}

TEST_CASE("folders, pipes, missing and too long files are refused by name") {
  TemporaryFolder folder;
  ::mkfifo((folder / "pipe").c_str(), 0600);
  spill(folder / "long", "0123456789");
  const auto open_message = [&](const std::string& name) {
    return message_of<Error>([&] { MappedFile::open(folder / name); });
  };
  CHECK(contains(open_message(""), "is a folder"));
  CHECK(contains(open_message("pipe"), "is not a regular file"));
  CHECK(contains(open_message("nothing"), "nothing: No such file"));
  CHECK(contains(message_of<Error>([&] { read_file(folder / "long", 9); }), "10 bytes, at most 9"));
}

TEST_CASE("an uncommitted file leaves the target and no temporary behind") {
  TemporaryFolder folder;
  spill(folder / "x", "old");
  {
    AtomicFile file(folder / "x");
    file.write("new");
    CHECK(entries(folder.path()) == 2);
  }
  CHECK(slurp(folder / "x") == "old");
  CHECK(entries(folder.path()) == 1);
}

TEST_CASE("a committed file has every byte, whatever the sizes of the writes") {
  TemporaryFolder folder;
  std::string expected;
  AtomicFile file(folder / "x");
  for (const size_t n : {1, 0, 70000, 300000, 262144, 5, 262143, 1}) {
    const std::string part(n, static_cast<char>('a' + n % 23));
    file.write(part);
    expected += part;
  }
  file.pad(5000);
  expected += std::string(5000, '\0');
  CHECK(file.written() == expected.size());
  file.commit();
  CHECK(slurp(folder / "x") == expected);
  CHECK(entries(folder.path()) == 1);
  CHECK(contains(message_of<Error>([&] { file.commit(); }), "committed already"));
  CHECK(contains(message_of<Error>([&] { file.write("x"); }), "committed already"));
}

TEST_CASE("a private file stays private when it is rewritten") {
  TemporaryFolder folder;
  spill(folder / "x", "old");
  fs::permissions(folder / "x", fs::perms::owner_read | fs::perms::owner_write);
  write_file(folder / "x", "new");
  CHECK(fs::status(folder / "x").permissions() == (fs::perms::owner_read | fs::perms::owner_write));
}

TEST_CASE("a link at the target is replaced and what it pointed to stays") {
  TemporaryFolder folder;
  spill(folder / "blob", "shared");
  fs::create_symlink("blob", folder / "x");
  write_file(folder / "x", "new");
  CHECK(slurp(folder / "blob") == "shared");
  CHECK(slurp(folder / "x") == "new");
}

TEST_CASE("devices and folders are not replaced by files") {
  TemporaryFolder folder;
  CHECK(contains(message_of<Error>([] { AtomicFile file("/dev/null"); }), "not a regular file"));
  CHECK(contains(message_of<Error>([&] { AtomicFile file(folder.path()); }), "is a folder"));
  CHECK(contains(message_of<Error>([&] { AtomicFile file(folder / "no/x"); }), "No such file"));
}

TEST_CASE("a write beyond the allowed size is an error that names file and cause") {
  TemporaryFolder folder;
  spill(folder / "x", "old");
  const int code = in_child([&] {
    ::signal(SIGXFSZ, SIG_IGN);
    const rlimit limit = {100000, 100000};
    ::setrlimit(RLIMIT_FSIZE, &limit);
    const std::string message = message_of<Error>([&] {
      AtomicFile file(folder / "x");
      for (int i = 0; i < 100; ++i) file.write(std::string(10000, 'n'));
      file.commit();
    });
    return contains(message, (folder / "x").string()) && contains(message, "File too large");
  });
  CHECK(code == 0);
  CHECK(slurp(folder / "x") == "old");
  CHECK(entries(folder.path()) == 1);
}

TEST_CASE("a full disk is an error that names file and cause, also when it shows at commit") {
  TemporaryFolder folder;
  for (const size_t bytes : {size_t{10}, size_t{1} << 20}) {
    const int code = in_child([&] {
      AtomicFile file(folder / "x");
      // Put the device that is always full in the place of the temporary file.
      for (const auto& entry : fs::directory_iterator("/proc/self/fd")) {
        std::error_code gone;
        const auto target = fs::read_symlink(entry.path(), gone);
        if (!gone && contains(target.string(), ".x.tmp-")) {
          const int full = ::open("/dev/full", O_WRONLY);
          ::dup2(full, std::stoi(entry.path().filename().string()));
          break;
        }
      }
      const std::string message = message_of<Error>([&] {
        file.write(std::string(bytes, 'x'));
        file.commit();
      });
      return contains(message, (folder / "x").string()) && contains(message, "No space left");
    });
    CHECK(code == 0);
    CHECK(!fs::exists(folder / "x"));
  }
}

TEST_CASE("a file is whole after its writer is killed at any moment") {
  TemporaryFolder folder;
  const fs::path target = folder / "x";
  const auto content = [](int i) { return std::string(400000, static_cast<char>('a' + i % 26)); };
  write_file(target, content(0));
  kill_at_random(
      40, [&](int i) { write_file(target, content(i)); },
      [&] {
        const std::string now = slurp(target);
        REQUIRE(now.size() == 400000);
        CHECK(now.find_first_not_of(now[0]) == std::string::npos);
      });
  write_file(target, "last");
  CHECK(slurp(target) == "last");
  CHECK(entries(folder.path()) == 1);
}

TEST_CASE("a folder is whole after its writer is killed at any moment") {
  TemporaryFolder folder;
  for (const auto existing : {Existing::replace, Existing::keep_others}) {
    const fs::path target = folder / "out";
    save_pair(target, "start", existing);
    kill_at_random(
        40, [&](int i) { save_pair(target, "text " + std::to_string(i), existing); },
        [&] {
          const std::string a = slurp(target / "a");
          CHECK(!a.empty());
          CHECK(a == slurp(target / "b"));
        });
    save_pair(target, "last", existing);
    CHECK(slurp(target / "a") == "last");
    CHECK(entries(folder.path()) == 1);
  }
}

TEST_CASE("temporaries of living writers are left alone") {
  TemporaryFolder folder;
  AtomicFile first(folder / "x");
  first.write("first");
  AtomicFolder slow(folder / "out", Existing::replace);
  write_file(folder / "x", "second");
  save_pair(folder / "out", "quick", Existing::replace);
  spill(slow.path() / "a", "slow");
  first.commit();
  slow.commit();
  CHECK(slurp(folder / "x") == "first");
  CHECK(slurp(folder / "out" / "a") == "slow");
  CHECK(entries(folder.path()) == 2);
}

TEST_CASE("an existing folder is refused, replaced or completed, as asked") {
  TemporaryFolder folder;
  const fs::path target = folder / "deep/out";
  save_pair(target, "one", Existing::refuse);
  CHECK(contains(message_of<Error>([&] { save_pair(target, "two", Existing::refuse); }),
                 "exists already"));
  spill(target / "notes.txt", "mine");
  fs::create_directories(target / "sub");
  spill(target / "sub/more.txt", "mine too");
  save_pair(target, "three", Existing::keep_others);
  CHECK(slurp(target / "a") == "three");
  CHECK(slurp(target / "notes.txt") == "mine");
  CHECK(slurp(target / "sub/more.txt") == "mine too");
  save_pair(target, "four", Existing::replace);
  CHECK(slurp(target / "b") == "four");
  CHECK(entries(target) == 2);
  CHECK(entries(folder / "deep") == 1);
}

TEST_CASE("a folder that appears while another is written is not overwritten by refuse") {
  TemporaryFolder folder;
  AtomicFolder out(folder / "out", Existing::refuse);
  fs::create_directory(folder / "out");
  CHECK(contains(message_of<Error>([&] { out.commit(); }), "exists already"));
}

TEST_CASE("an uncommitted folder leaves nothing behind") {
  TemporaryFolder folder;
  {
    AtomicFolder out(folder / "out", Existing::refuse);
    spill(out.path() / "a", "x");
  }
  CHECK(entries(folder.path()) == 0);
}

TEST_CASE("folders are exchanged also where the file system lacks the exchange") {
  TemporaryFolder folder;
  const fs::path target = folder / "out";
  const int code = in_child([&] {
    if (!forbid_renameat2()) return false;
    save_pair(target, "one", Existing::refuse);
    save_pair(target, "two", Existing::replace);
    const auto again = message_of<Error>([&] { save_pair(target, "three", Existing::refuse); });
    return contains(again, "exists already");
  });
  CHECK(code == 0);
  CHECK(slurp(target / "a") == "two");
  CHECK(entries(folder.path()) == 1);
  // A kill between the two renames: the old folder stands aside, the new one has no name yet.
  fs::rename(target, folder / ".out.old-1-1");
  AtomicFolder next(target, Existing::keep_others);
  CHECK(slurp(target / "a") == "two");
}

TEST_CASE("the current directory and what is no folder are refused as folders") {
  TemporaryFolder folder;
  spill(folder / "x", "file");
  CHECK(contains(message_of<Error>([] { AtomicFolder out(".", Existing::replace); }),
                 "current directory"));
  CHECK(contains(message_of<Error>([&] { AtomicFolder out(folder / "x", Existing::replace); }),
                 "is not a folder"));
  CHECK(contains(message_of<Error>([&] { AtomicFolder out(folder / "x/y", Existing::replace); }),
                 "Not a directory"));
}
