// Direct reads (O_DIRECT) of a file at random places: by threads with pread, and by io_uring.
//
//   direct_reads FILE BYTES READS METHOD WIDTH PIECES SEED
//
// METHOD is `threads` (WIDTH of them, one read each) or `uring` (one thread with WIDTH expert reads
// submitted, each in PIECES requests, whose completions it waits for). Prints bytes per second and
// the processor's seconds per GB. io_uring is used by its system calls, without liburing.

#include <fcntl.h>
#include <linux/io_uring.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

namespace {

constexpr size_t ALIGNMENT = 4096;

[[noreturn]] void fail(const char* what) {
  perror(what);
  exit(1);
}

char* aligned(size_t bytes) {
  void* found = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
  if (found == MAP_FAILED) fail("mmap");
  return static_cast<char*>(found);
}

void read_all(int file, char* into, size_t bytes, off_t offset) {
  for (size_t done = 0; done < bytes;) {
    const ssize_t count = pread(file, into + done, bytes - done, offset + done);
    if (count <= 0) fail("pread");
    done += count;
  }
}

void by_threads(int file, size_t bytes, const std::vector<off_t>& places, int width) {
  std::atomic<size_t> next{0};
  std::vector<std::thread> threads;
  for (int at = 0; at < width; ++at) {
    threads.emplace_back([&] {
      char* buffer = aligned(bytes);
      for (size_t one; (one = next++) < places.size();) read_all(file, buffer, bytes, places[one]);
      munmap(buffer, bytes);
    });
  }
  for (auto& one : threads) one.join();
}

struct Ring {
  int descriptor;
  unsigned *tail, *mask, *array, *done_head, *done_tail, *done_mask;
  io_uring_sqe* entries;
  io_uring_cqe* done;

  explicit Ring(unsigned size) {
    io_uring_params given{};
    descriptor = static_cast<int>(syscall(__NR_io_uring_setup, size, &given));
    if (descriptor < 0) fail("io_uring_setup");
    const size_t sq = given.sq_off.array + given.sq_entries * sizeof(unsigned);
    const size_t cq = given.cq_off.cqes + given.cq_entries * sizeof(io_uring_cqe);
    char* to = shared(sq, IORING_OFF_SQ_RING);
    char* from = shared(cq, IORING_OFF_CQ_RING);
    entries = reinterpret_cast<io_uring_sqe*>(
        shared(given.sq_entries * sizeof(io_uring_sqe), IORING_OFF_SQES));
    tail = number(to, given.sq_off.tail);
    mask = number(to, given.sq_off.ring_mask);
    array = number(to, given.sq_off.array);
    done_head = number(from, given.cq_off.head);
    done_tail = number(from, given.cq_off.tail);
    done_mask = number(from, given.cq_off.ring_mask);
    done = reinterpret_cast<io_uring_cqe*>(from + given.cq_off.cqes);
  }

  char* shared(size_t bytes, off_t offset) const {
    void* found = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE,
                       descriptor, offset);
    if (found == MAP_FAILED) fail("mmap of the ring");
    return static_cast<char*>(found);
  }

  static unsigned* number(char* base, unsigned offset) {
    return reinterpret_cast<unsigned*>(base + offset);
  }

  void request(int file, char* into, unsigned bytes, off_t offset, unsigned long data) const {
    const unsigned at = *tail & *mask;
    io_uring_sqe& one = entries[at];
    memset(&one, 0, sizeof one);
    one.opcode = IORING_OP_READ;
    one.fd = file;
    one.addr = reinterpret_cast<unsigned long>(into);
    one.len = bytes;
    one.off = offset;
    one.user_data = data;
    array[at] = at;
    __atomic_store_n(tail, *tail + 1, __ATOMIC_RELEASE);
  }

  void enter(unsigned submitted, unsigned wait) const {
    if (syscall(__NR_io_uring_enter, descriptor, submitted, wait, IORING_ENTER_GETEVENTS, nullptr,
                0) < 0)
      fail("io_uring_enter");
  }
};

void by_uring(int file, size_t bytes, const std::vector<off_t>& places, int width, int pieces) {
  const Ring ring(width * pieces);
  const size_t piece = (bytes / pieces + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
  std::vector<char*> buffers;
  std::vector<int> left(width, 0);
  for (int at = 0; at < width; ++at) buffers.push_back(aligned(bytes));
  size_t next = 0, complete = 0;
  unsigned submitted = 0;
  const auto begin = [&](int at) {
    for (size_t from = 0; from < bytes; from += piece, ++left[at], ++submitted) {
      const size_t size = std::min(piece, bytes - from);
      ring.request(file, buffers[at] + from, size, places[next] + from, at << 24 | size >> 12);
    }
    ++next;
  };
  for (int at = 0; at < width && next < places.size(); ++at) begin(at);
  while (complete < places.size()) {
    ring.enter(submitted, 1);
    submitted = 0;
    unsigned head = *ring.done_head;
    while (head != __atomic_load_n(ring.done_tail, __ATOMIC_ACQUIRE)) {
      const io_uring_cqe& one = ring.done[head++ & *ring.done_mask];
      const int at = one.user_data >> 24;
      if (one.res != static_cast<int>((one.user_data & 0xffffff) << 12)) {
        fprintf(stderr, "a read returned %d\n", one.res);
        exit(1);
      }
      if (--left[at] == 0) {
        ++complete;
        if (next < places.size()) begin(at);
      }
    }
    __atomic_store_n(ring.done_head, head, __ATOMIC_RELEASE);
  }
}

double processor_seconds() {
  rusage used{};
  getrusage(RUSAGE_SELF, &used);
  const auto seconds = [](const timeval& one) { return one.tv_sec + 1e-6 * one.tv_usec; };
  return seconds(used.ru_utime) + seconds(used.ru_stime);
}

}  // namespace

int main(int count, char** given) {
  if (count != 8) return fprintf(stderr, "see the source for its arguments\n"), 2;
  const size_t bytes = strtoull(given[2], nullptr, 10) / ALIGNMENT * ALIGNMENT;
  const int reads = atoi(given[3]), width = atoi(given[5]), pieces = atoi(given[6]);
  const int file = open(given[1], O_RDONLY | O_DIRECT);
  if (file < 0) fail("open");
  struct stat about{};
  fstat(file, &about);
  std::mt19937_64 random(strtoull(given[7], nullptr, 10));
  std::vector<off_t> places;
  for (int at = 0; at < reads; ++at)
    places.push_back(random() % ((about.st_size - bytes) / ALIGNMENT) * ALIGNMENT);
  const double used = processor_seconds();
  const auto began = std::chrono::steady_clock::now();
  if (std::string(given[4]) == "threads")
    by_threads(file, bytes, places, width);
  else
    by_uring(file, bytes, places, width, pieces);
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - began;
  const double gb = 1e-9 * bytes * reads;
  printf("%f %f\n", gb / took.count(), (processor_seconds() - used) / gb);
}
