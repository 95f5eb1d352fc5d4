#include "cpu/segment.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <ctime>
#include <utility>

#include "core/errors.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23  // Linux 5.14; where it is missing pages are faulted in by use
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25  // Linux 6.1; where it is missing pages stay small
#endif

namespace ep {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr int kStaleSeconds = 10;  // longer than any process needs from open() to its lock

struct flock whole_file(short type) {
    struct flock lock = {};
    lock.l_type = type;
    lock.l_whence = SEEK_SET;
    return lock;
}

}  // namespace

Segment::Segment(std::string path, int file, size_t num_bytes, bool is_owner)
    : path_(std::move(path)),
      file_(file),
      num_bytes_(num_bytes),
      is_owner_(is_owner),
      has_name_(is_owner) {}

std::shared_ptr<Segment> Segment::create(const std::string& folder,
                                         const std::string& name,
                                         size_t num_bytes) {
    const std::string path = folder + "/" + name;
    const int file = ::open(path.c_str(), O_CREAT | O_EXCL | O_RDWR | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (file < 0) fail_errno("cannot create " + path, errno);
    std::shared_ptr<Segment> segment(new Segment(path, file, num_bytes, true));
    struct flock lock = whole_file(F_WRLCK);
    if (fcntl(file, F_SETLK, &lock) != 0) fail_errno("cannot lock " + path, errno);
    if (ftruncate(file, static_cast<off_t>(num_bytes)) != 0)
        fail_errno("cannot size " + path, errno);
    segment->map();
    return segment;
}

std::shared_ptr<Segment> Segment::open(const std::string& folder, const std::string& name) {
    const std::string path = folder + "/" + name;
    if (name.empty() || name.find('/') != std::string::npos) fail("not a segment name: ", name);
    const int file = ::open(path.c_str(), O_RDWR | O_NOFOLLOW | O_CLOEXEC);
    if (file < 0) fail_errno("cannot open " + path, errno);
    struct stat status = {};
    const bool is_ours = fstat(file, &status) == 0 && S_ISREG(status.st_mode) &&
                         status.st_uid == geteuid() && (status.st_mode & 0777) == 0600;
    std::shared_ptr<Segment> segment(
        new Segment(path, file, static_cast<size_t>(status.st_size), false));
    if (!is_ours) fail(path, " is not a file of this user with mode 0600");
    segment->map();
    return segment;
}

void Segment::map() {
    // Aligned to huge pages, so that a file system mounted with them can use them.
    const size_t reserved = num_bytes_ + kHugePage;
    void* space =
        mmap(nullptr, reserved, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (space == MAP_FAILED) fail_errno("cannot reserve address space for " + path_, errno);
    auto start = reinterpret_cast<uintptr_t>(space);
    const uintptr_t aligned = (start + kHugePage - 1) & ~(kHugePage - 1);
    if (aligned > start) munmap(space, aligned - start);
    const uintptr_t end = aligned + num_bytes_;
    if (start + reserved > end) {
        const uintptr_t page_end = (end + 4095) & ~uintptr_t{4095};
        munmap(reinterpret_cast<void*>(page_end), start + reserved - page_end);
    }
    void* mapped = mmap(reinterpret_cast<void*>(aligned), num_bytes_, PROT_READ | PROT_WRITE,
                        MAP_SHARED | MAP_FIXED | MAP_NORESERVE, file_, 0);
    if (mapped == MAP_FAILED) fail_errno("cannot map " + path_, errno);
    base_ = static_cast<char*>(mapped);
    madvise(base_, num_bytes_, MADV_HUGEPAGE);  // advice only: most systems allow it nowhere here
}

Segment::~Segment() {
    if (base_ != nullptr) munmap(base_, num_bytes_);
    unlink();
    close_file();
}

void Segment::close_file() {
    if (file_ >= 0) ::close(std::exchange(file_, -1));
}

void Segment::unlink() {
    if (std::exchange(has_name_, false)) ::unlink(path_.c_str());
}

void Segment::commit(size_t num_bytes) {
    if (num_bytes <= num_ready_) return;
    if (num_bytes > num_bytes_)
        fail(num_bytes, " bytes of shared memory are needed and ", num_bytes_, " are the limit");
    collapse(num_bytes);
    // posix_fallocate would write zeros by hand where the file system lacks the call.
    while (fallocate(file_, 0, static_cast<off_t>(num_ready_),
                     static_cast<off_t>(num_bytes - num_ready_)) != 0) {
        if (errno != EINTR)
            fail_errno(text("cannot allocate ", num_bytes, " bytes of shared memory"), errno);
    }
    populate(num_bytes);
}

/// Ask for huge pages between what is ready and `num_bytes`. Rows are scattered, so with small
/// pages every row costs a walk through the page tables, which is a good part of moving it. The
/// request needs no privilege and no mount option; it may fail without harm.
void Segment::collapse(size_t num_bytes) {
    const size_t first = num_ready_ / kHugePage * kHugePage;
    const size_t end = num_bytes / kHugePage * kHugePage;
    if (end > first) madvise(base_ + first, end - first, MADV_COLLAPSE);
}

void Segment::populate(size_t num_bytes) {
    constexpr size_t kPage = 4096;
    const size_t first = num_ready_ / kPage * kPage;
    if (num_bytes <= first) return;
    if (!is_owner_) collapse(num_bytes);  // the owner has them by now; this maps them as such
    if (madvise(base_ + first, num_bytes - first, MADV_POPULATE_WRITE) != 0 && errno != EINVAL)
        fail_errno(text("cannot reach ", num_bytes, " bytes of ", path_), errno);
    num_ready_ = num_bytes;
}

bool Segment::is_owner_alive() const {
    if (is_owner_ || file_ < 0) return file_ >= 0;
    struct flock lock = whole_file(F_WRLCK);
    if (fcntl(file_, F_GETLK, &lock) != 0) return true;  // unknown: the deadline will tell
    return lock.l_type != F_UNLCK;
}

int remove_stale_segments(const std::string& folder, const std::string& prefix) {
    DIR* entries = opendir(folder.c_str());
    if (entries == nullptr) return 0;
    // Closing any descriptor of a file gives up this process's lock on it: leave our own alone.
    const std::string own = prefix + std::to_string(getpid()) + ".";
    int num_removed = 0;
    while (const dirent* entry = readdir(entries)) {
        const std::string name = entry->d_name;
        if (!name.starts_with(prefix) || name.starts_with(own)) continue;
        const std::string path = folder + "/" + name;
        const int file = ::open(path.c_str(), O_RDWR | O_NOFOLLOW | O_CLOEXEC);
        if (file < 0) continue;
        struct stat status = {};
        struct flock lock = whole_file(F_WRLCK);
        const bool is_stale = fstat(file, &status) == 0 && status.st_uid == geteuid() &&
                              std::time(nullptr) - status.st_mtime > kStaleSeconds &&
                              fcntl(file, F_SETLK, &lock) == 0;
        if (is_stale && ::unlink(path.c_str()) == 0) ++num_removed;
        ::close(file);
    }
    closedir(entries);
    return num_removed;
}

}  // namespace ep
