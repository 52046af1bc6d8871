#include "csrc/jit/file.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <system_error>
#include <thread>

#include "csrc/jit/error.h"

namespace dg::jit {
namespace {

constexpr auto kLockPoll = std::chrono::milliseconds(5);  // Little beside a compile of 300 ms.

int WriteAll(int fd, std::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t written = write(fd, bytes.data(), bytes.size());
    if (written >= 0) {
      bytes.remove_prefix(static_cast<std::size_t>(written));
    } else if (errno != EINTR) {
      return errno;
    }
  }
  return 0;
}

bool IsAt(int fd, const std::string& path) {
  struct stat held = {};
  struct stat named = {};
  return fstat(fd, &held) == 0 && stat(path.c_str(), &named) == 0 && held.st_dev == named.st_dev &&
         held.st_ino == named.st_ino;
}

}  // namespace

std::optional<std::string> ReadFile(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return std::nullopt;
  std::string bytes;
  struct stat status = {};
  // A regular file only: reading a pipe or a device at this path could block for ever.
  bool good = fstat(fd, &status) == 0 && S_ISREG(status.st_mode);
  if (good) bytes.resize(static_cast<std::size_t>(status.st_size));
  for (std::size_t done = 0; good && done < bytes.size();) {
    const ssize_t got = read(fd, bytes.data() + done, bytes.size() - done);
    if (got < 0 && errno == EINTR) continue;
    good = got > 0;
    if (good) done += static_cast<std::size_t>(got);
  }
  close(fd);
  if (!good) return std::nullopt;
  return bytes;
}

int ReplaceFile(const std::string& path, std::string_view bytes) {
  std::string temporary = path + ".XXXXXX";
  const int fd = mkostemp(temporary.data(), O_CLOEXEC);
  if (fd < 0) return errno;
  int error = WriteAll(fd, bytes);
  // Readable by everyone who shares the folder; mkostemp makes files for the owner alone.
  if (fchmod(fd, 0644) != 0 && error == 0) error = errno;
  if (close(fd) != 0 && error == 0) error = errno;
  if (error == 0 && std::rename(temporary.c_str(), path.c_str()) != 0) error = errno;
  if (error != 0) unlink(temporary.c_str());
  return error;
}

int CreateFolders(const std::string& path) {
  std::error_code error;
  std::filesystem::create_directories(path, error);
  return error.value();
}

PrivateFolder::PrivateFolder(const std::string& parent) : path_(parent + "/jax_deepgemm.XXXXXX") {
  if (mkdtemp(path_.data()) == nullptr) {
    throw Error(ErrorCode::kInternal, "mkdtemp " + path_ + ": " + std::strerror(errno));
  }
}

PrivateFolder::~PrivateFolder() {
  std::error_code ignored;  // What cannot be removed stays behind; nobody else uses the name.
  std::filesystem::remove_all(path_, ignored);
}

FileLock::FileLock(const std::string& path, double patience_seconds) : path_(path) {
  const auto deadline =
      std::chrono::steady_clock::now() + std::chrono::duration<double>(patience_seconds);
  while (true) {
    fd_ = open(path_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (fd_ < 0) {
      error_ = errno;
      return;
    }
    int error = 0;
    while (flock(fd_, LOCK_EX | LOCK_NB) != 0) {
      error = errno;
      const bool expired = std::chrono::steady_clock::now() > deadline;
      if (expired || (error != EWOULDBLOCK && error != EINTR)) break;
      error = 0;
      std::this_thread::sleep_for(kLockPoll);
    }
    if (error == 0 && IsAt(fd_, path_)) return;
    close(fd_);
    fd_ = -1;
    if (error != 0) {
      error_ = error == EWOULDBLOCK ? ETIMEDOUT : error;
      return;
    }
  }
}

FileLock::~FileLock() {
  if (fd_ < 0) return;
  unlink(path_.c_str());
  // Said aloud, because a process forked meanwhile shares the lock: close alone would leave it
  // held.
  flock(fd_, LOCK_UN);
  close(fd_);
}

}  // namespace dg::jit
