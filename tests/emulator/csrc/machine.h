#pragma once
// The machine: ranks, their memory, streams, and the kernels that run.
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <set>
#include <thread>

#include "memory.h"
#include "random.h"
#include "step.h"

namespace ptx {

enum class Wait : u8 { kNone, kLanes, kBarrier, kBulk };

/// Lanes that are at the same instruction.
struct Group {
    u32 pc = 0;
    u32 mask = 0;
    Wait wait = Wait::kNone;
    u32 barrier = 0;  // the barrier, or the membermask of a warp barrier
    u64 generation = 0;
};

/// What race detection knows of a warp's lanes.
struct WarpKnowledge {
    std::array<Knowledge, kLanes> known;
    // By the scope a fence needs: read by relaxed loads, known after that fence.
    std::array<std::array<Knowledge, 3>, kLanes> pending;
    // By the scope of the fence that made it ready for later relaxed stores.
    std::array<std::array<Knowledge, 3>, kLanes> released;
    std::array<const Clock*, kLanes> last_acquired{};
};

struct Launch;
struct Cta;

struct Warp {
    Cta* cta = nullptr;
    u32 index = 0;    // in its CTA
    u32 slot = 0;     // its name in clocks
    u32 initial = 0;  // the lanes it began with
    u32 live = 0;
    bool is_runnable = false;
    std::vector<u64> registers;
    std::vector<u32> defined;  // per tracked row
    std::vector<Group> groups;
    std::vector<u8> local;  // per lane one block
    std::unique_ptr<WarpKnowledge> knowledge;
    u64 bulk_group = 0;  // groups committed so far
    u32 bulk_issued = 0;
    i32 bulk_read_slot = -1, bulk_write_slot = -1;
    std::vector<std::pair<u64, Knowledge>> bulk_reads_done, bulk_writes_done;  // group, knowledge
};

/// One of a CTA's sixteen barriers.
struct Barrier {
    u32 expected = 0;  // threads; 0: all that live
    u32 arrived = 0;
    u64 generation = 0;
    u32 votes = 0;  // bar.red: true predicates, and all of them
    u32 voters = 0;
    u32 result_count = 0, result_voters = 0;
    std::set<u32> warps;
    Knowledge arriving, completed;
};

struct TransactionBarrier {
    u32 expected = 0, pending = 0;
    i64 bytes = 0;
    u64 phase = 0;
    Knowledge arriving, completed;
};

struct Cta {
    Launch* launch = nullptr;
    u32 id = 0;  // unique in the machine
    std::array<u32, 3> index{};
    std::unique_ptr<Region> shared;
    std::vector<std::unique_ptr<Warp>> warps;
    std::array<Barrier, 16> barriers;
    std::map<u64, TransactionBarrier> transaction_barriers;  // by shared address
    u32 live_warps = 0;
};

/// What a kernel moved, summed over all of its launches.
struct Counts {
    u64 launches = 0, warp_instructions = 0, lane_instructions = 0;
    u64 shared_read = 0, shared_written = 0, local_read = 0, local_written = 0;
    u64 global_read = 0, global_written = 0;  // the rank's own memory
    u64 peer_read = 0, peer_written = 0;      // other ranks' memory
    u64 atomics = 0, bulk_read = 0, bulk_written = 0;
};

/// Scopes below .sys end at a device. A rank's host counts as a device of its own; twice is the
/// rank.
inline int host_of(int rank) { return -1 - rank; }

struct Launch {
    int rank = 0;
    int device = 0;  // the rank's GPU, or host_of(rank)
    int stream = 0;
    u64 number = 0;
    std::shared_ptr<Module> module;
    std::shared_ptr<Kernel> kernel;
    std::array<u32, 3> grid{}, block{};
    u32 dynamic_shared = 0;
    std::vector<u8> parameters;
    std::vector<std::unique_ptr<Cta>> ctas;
    u32 live_ctas = 0;
    bool started = false;
    Counts* counts = nullptr;
    Knowledge knowledge;  // race mode: what the host knew, later what its warps left
};

struct Options {
    bool race = false;
    bool weak = false;
    u64 seed = 0;
    u64 patience = 2'000'000;  // warp instructions without progress that count as a hang
    u64 nanoseconds_per_instruction = 10;
    double grace_seconds = 0.02;  // how long a run waits for ranks that are not there yet
    double late_seconds = 1.0;    // how long a host may be away before time passes without it
    double host_seconds =
        120;  // how long ranks in synchronize wait for a host that launches nothing
};

/// A place in a kernel, for reports about the past.
struct Site {
    const Kernel* kernel;
    const Module* module;
    const Instruction* instruction;
};

struct Report {
    std::string kind;  // race, proxy, uninitialised, barrier, local
    std::string text;
};

/// A kernel did what no kernel may do; the machine stops.
class Fault : public std::runtime_error {
 public:
    using std::runtime_error::runtime_error;
};

class Races;
class StoreBuffers;
class BulkCopies;

/// Intrinsic called by kernels through `call`: one row of arguments per active lane.
struct Call {
    int rank;
    u32 lanes;
    std::vector<std::array<u64, kLanes>> arguments;
    std::array<u64, kLanes> result{};
};
using Intrinsic = std::function<void(Call&)>;

class Machine {
 public:
    Machine(int num_ranks, Options options);
    ~Machine();

    // The host's side. All of these may be called by any thread.
    u64 allocate(int rank, u64 num_bytes, bool symmetric, const std::string& name);
    void free(u64 address);
    void write(int rank, u64 address, const u8* bytes, u64 count);
    void read(int rank, u64 address, u8* bytes, u64 count);
    void load(const std::string& text);
    void launch(int rank,
                const std::string& kernel,
                std::array<u32, 3> grid,
                std::array<u32, 3> block,
                u32 shared_bytes,
                std::vector<u8> parameters,
                int stream,
                bool on_host);
    void run();
    /// Return when the rank's launches (of one stream, unless negative) have ended.
    void synchronize(int rank, int stream);
    /// Run for a while, for hosts that wait for a word in memory. False: the rank has nothing to
    /// run.
    bool advance(int rank, u64 max_instructions);
    /// All hosts have met: what one knew, all know now.
    void meet();
    void set_intrinsic(const std::string& name, Intrinsic intrinsic);

    // What handlers use.
    const Options& options() const { return options_; }
    int num_ranks() const { return num_ranks_; }
    Memory& memory() { return memory_; }
    Races* races() { return races_.get(); }
    StoreBuffers* store_buffers() { return store_buffers_.get(); }
    BulkCopies& bulk_copies() { return *bulk_copies_; }
    Random& random() { return random_; }
    u64 nanoseconds() const {
        return steps_ * options_.nanoseconds_per_instruction + skipped_nanoseconds_;
    }
    void skip_nanoseconds(u64 count) { skipped_nanoseconds_ += count; }
    void time_was_read() { last_time_read_ = steps_; }
    u64 cycles() const { return steps_; }
    void made_progress() { last_progress_ = steps_, num_time_jumps_ = 0; }
    void wake(Warp& warp);
    /// One of the launch's bulk copies has ended.
    void copy_ended(Launch& launch);
    void report(const std::string& kind, const std::string& key, const std::string& text);
    [[noreturn]] void fault(const Warp& warp,
                            int lane,
                            const Instruction& instruction,
                            const std::string& what);
    void check_barrier(Cta& cta, u32 number);
    std::string where(const Warp& warp, int lane, const Instruction& instruction) const;
    std::string describe(i32 site) const;
    /// Inside, launches may be made: they come after `knowledge`, and what their rank did before.
    void call_intrinsic(const std::string& name, Call& call, const Knowledge& knowledge);
    bool tracks_proxy() const { return tracks_proxy_; }
    u64 global_variable(int rank, const std::string& name) const {
        return variables_.at({rank, name});
    }

    // What has been seen.
    const std::vector<Report>& reports() const { return reports_; }
    const std::map<std::string, Counts>& counts() const { return counts_; }
    const std::map<std::string, std::pair<std::shared_ptr<Module>, std::shared_ptr<Kernel>>>&
    kernels() const {
        return kernels_;
    }
    u64 steps() const { return steps_; }

 private:
    using Queue = std::deque<std::unique_ptr<Launch>>;
    void start_ready_launches();
    void start(Launch& launch);
    std::unique_ptr<Warp> make_warp(Launch& launch, Cta& cta, u32 index);
    void fill_presets(const Launch& launch, const Cta& cta, Warp& warp);
    void finish_warp(Warp& warp);
    void finish_launch(Launch& launch);
    enum class Progress { kRan, kIdle, kStuck };
    Progress run_slice(u64 max_instructions);
    void run_burst(Warp& warp, u64 budget);
    int choose_group(Warp& warp);
    void merge_groups(Warp& warp);
    int look_at_bulk(Warp& warp, int index);
    void check_defined(Warp& warp,
                       const Instruction& instruction,
                       u32 active,
                       const Kernel& kernel);
    void mark_defined(Warp& warp, const Instruction& instruction, u32 active, const Kernel& kernel);
    bool let_time_pass();
    bool is_host_late();
    bool is_idle(int rank, int stream) const;
    std::string describe_waiting() const;
    using Predicate = std::function<bool()>;
    /// A host inside synchronize or run, for as long as this lives. The mutex is held at both ends.
    struct Waiting {
        Waiting(Machine& machine_, const Predicate& done_) : machine(machine_), done(done_) {
            machine.waiting_.insert(&done), machine.changed_.notify_all();
        }
        ~Waiting() { machine.waiting_.erase(&done), machine.changed_.notify_all(); }
        Machine& machine;
        const Predicate& done;
    };
    /// Whether every rank's host waits for something that has not happened: none will launch.
    bool all_hosts_wait() const;
    void throw_if_broken() const;
    /// The mutex, for a host that launches or moves data: whoever executes stops for it.
    class HostLock {
     public:
        explicit HostLock(const Machine& machine) : lock_(machine.mutex_, std::defer_lock) {
            if (machine.is_inside_call()) return;  // by the thread that holds the mutex
            ++machine.num_hosts_calling_;
            lock_.lock();
            --machine.num_hosts_calling_;
        }

     private:
        std::unique_lock<std::mutex> lock_;
    };
    void let_hosts_in() const {
        while (num_hosts_calling_ > 0) std::this_thread::yield();
    }
    void drive(int rank, const Predicate& done);
    bool is_inside_call() const { return calling_thread_.load() == std::this_thread::get_id(); }

    const int num_ranks_;
    const Options options_;
    Random random_;
    Memory memory_;
    std::unique_ptr<Races> races_;
    std::unique_ptr<StoreBuffers> store_buffers_;
    std::unique_ptr<BulkCopies> bulk_copies_;
    std::map<std::string, std::pair<std::shared_ptr<Module>, std::shared_ptr<Kernel>>> kernels_;
    std::map<std::pair<int, std::string>, u64> variables_;
    std::vector<Site> sites_;
    std::map<std::string, Intrinsic> intrinsics_;
    const Knowledge* caller_ = nullptr;  // of the intrinsic that runs, by the thread that executes
    std::atomic<std::thread::id> calling_thread_;
    std::map<std::pair<int, int>, Queue> streams_;  // (rank, stream) -> launches in order
    std::vector<std::unique_ptr<Launch>> retired_;
    std::vector<Warp*> runnable_;
    std::map<std::string, Counts> counts_;
    std::vector<Report> reports_;
    std::set<std::string> reported_;
    u64 steps_ = 0, last_progress_ = 0, skipped_nanoseconds_ = 0;
    u64 last_time_read_ = 0;
    u32 num_time_jumps_ = 0;
    // The last progress that a slice began with, and when.
    u64 noted_progress_ = 0;
    std::chrono::steady_clock::time_point noted_at_{};
    std::map<std::pair<int, int>, Knowledge>
        stream_knowledge_;  // what a stream's next kernel comes after
    // How many bursts pass per step of a copy or drained store: prompt in some runs, late in
    // others.
    u64 copy_interval_, drain_interval_;
    u64 burst_kinds_;  // bursts are powers of two below 2 ** burst_kinds_
    u64 num_launches_ = 0;
    u32 num_ctas_ = 0;
    bool tracks_proxy_ = false;

    mutable std::mutex mutex_;
    std::condition_variable changed_;
    mutable std::atomic<int> num_hosts_calling_ = 0;
    bool is_driven_ = false;              // some thread executes right now
    std::set<const Predicate*> waiting_;  // what hosts inside synchronize wait for
    std::string broken_;                  // why the machine stopped
};

}  // namespace ptx
