// The few file operations of cache.h and of NVCC: whole files, private folders, locks.
//
// Reasons for failure come back as errno values, because most callers go on without the disk.
#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace dg::jit {

// The file's bytes, or nothing if it cannot be read.
std::optional<std::string> ReadFile(const std::string& path);

// Writes a temporary file in the same folder and renames it to `path`, so that a reader sees the
// old file or the new one, and of two writers the last one wins. Returns 0 or errno.
int ReplaceFile(const std::string& path, std::string_view bytes);

// Creates a folder and its parents unless they exist. Returns 0 or errno.
int CreateFolders(const std::string& path);

// A folder that only this process uses, removed with its contents at the end of its life.
class PrivateFolder {
 public:
  // Throws Error when `parent` allows no new folder.
  explicit PrivateFolder(const std::string& parent);
  ~PrivateFolder();

  PrivateFolder(const PrivateFolder&) = delete;
  PrivateFolder& operator=(const PrivateFolder&) = delete;

  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

// An exclusive lock among processes, held through a file that exists only while the lock is in use.
//
// It is an flock, which the kernel drops when its holder dies, so a crash leaves no lock behind (at
// most an empty file, which the next holder reuses and removes). Only a holder removes the file,
// and whoever gets a lock checks that the file it locked is still the one at the path, and starts
// over if not. Hence nobody holds a removed file's lock while another process locks its successor.
class FileLock {
 public:
  // Waits for the lock, but no longer than `patience_seconds`: its holder may be suspended.
  FileLock(const std::string& path, double patience_seconds);
  ~FileLock();

  FileLock(const FileLock&) = delete;
  FileLock& operator=(const FileLock&) = delete;

  // 0 when the lock is held, else why it is not: ETIMEDOUT, or what open or flock said.
  int error() const { return error_; }

 private:
  const std::string path_;
  int fd_ = -1;
  int error_ = 0;
};

}  // namespace dg::jit
