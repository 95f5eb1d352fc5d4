// The host's side of the machine: memory, modules, launches, waiting.
#include "machine.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <sstream>

#include "bulk.h"
#include "races.h"
#include "store_buffers.h"

namespace ptx {
namespace {

constexpr u64 kSliceInstructions = 20'000;  // between two looks at who else wants the machine

void expect(bool condition, const std::string& what) {
    if (!condition) throw std::invalid_argument(what);
}

}  // namespace

Machine::Machine(int num_ranks, Options options)
    : num_ranks_(num_ranks),
      options_(options),
      random_(options.seed),
      bulk_copies_(std::make_unique<BulkCopies>(*this)) {
    expect(num_ranks >= 1,
           "Machine: expected num_ranks to be at least 1, got " + std::to_string(num_ranks));
    copy_interval_ = u64{2} << 3 * random_.below(4);
    drain_interval_ = u64{1} << 2 * random_.below(3);
    burst_kinds_ = 1 + random_.below(8);
    if (options.race) races_ = std::make_unique<Races>(*this, num_ranks);
    if (options.weak) store_buffers_ = std::make_unique<StoreBuffers>(*this, num_ranks);
}

Machine::~Machine() = default;

u64 Machine::allocate(int rank, u64 num_bytes, bool symmetric, const std::string& name) {
    const HostLock lock(*this);
    expect(rank >= 0 && rank < num_ranks_, "allocate: expected rank to be in [0, " +
                                               std::to_string(num_ranks_) + "), got " +
                                               std::to_string(rank));
    return memory_.allocate(rank, num_bytes, symmetric, name).address;
}

void Machine::free(u64 address) {
    const HostLock lock(*this);
    if (store_buffers_)
        if (const Region* region = memory_.find(address))
            store_buffers_->flush(*region, 0, region->num_bytes);
    memory_.free(address);
}

void Machine::write(int rank, u64 address, const u8* bytes, u64 count) {
    const HostLock lock(*this);
    if (count == 0) return;
    Region* region = memory_.find(address);
    expect(region && region->contains(address, count),
           "write: expected memory, got " + memory_.explain(address, count));
    const u64 offset = address - region->address;
    if (races_) races_->host_access(rank, *region, offset, u32(count), true);
    if (store_buffers_) store_buffers_->flush(*region, offset, count);
    std::memcpy(region->data.get() + offset, bytes, count);
    std::memset(region->written.get() + offset, 1, count);
    made_progress();
}

void Machine::read(int rank, u64 address, u8* bytes, u64 count) {
    const HostLock lock(*this);
    if (count == 0) return;
    Region* region = memory_.find(address);
    expect(region && region->contains(address, count),
           "read: expected memory, got " + memory_.explain(address, count));
    const u64 offset = address - region->address;
    if (races_) races_->host_access(rank, *region, offset, u32(count), false);
    std::memcpy(bytes, region->data.get() + offset, count);
}

void Machine::load(const std::string& text) {
    const std::shared_ptr<Module> module = parse(text);
    const HostLock lock(*this);
    for (const auto& [name, kernel] : module->kernels) {
        expect(!kernels_.contains(name),
               "load: expected kernel '" + name + "' to be new, it has been loaded already");
        tracks_proxy_ |= kernel->uses_async_proxy;
    }
    for (const auto& [name, variable] : module->variables) {
        for (int rank = 0; rank < num_ranks_; ++rank) {
            Region& region = memory_.allocate(rank, variable.num_bytes, false, name);
            std::memcpy(region.data.get(), variable.initial.data(), variable.num_bytes);
            std::memset(region.written.get(), 1, variable.num_bytes);
            variables_[{rank, name}] = region.address;
        }
    }
    for (const auto& [name, kernel] : module->kernels) {
        for (Instruction& instruction : kernel->code) {
            instruction.site = i32(sites_.size());
            sites_.push_back({kernel.get(), module.get(), &instruction});
        }
        kernels_[name] = {module, kernel};
    }
}

void Machine::launch(int rank,
                     const std::string& kernel,
                     std::array<u32, 3> grid,
                     std::array<u32, 3> block,
                     u32 shared_bytes,
                     std::vector<u8> parameters,
                     int stream,
                     bool on_host) {
    const HostLock lock(*this);
    throw_if_broken();
    const auto found = kernels_.find(kernel);
    expect(rank >= 0 && rank < num_ranks_, "launch: expected rank to be in [0, " +
                                               std::to_string(num_ranks_) + "), got " +
                                               std::to_string(rank));
    expect(found != kernels_.end(),
           "launch: expected the name of a loaded kernel, got '" + kernel + "'");
    const u64 threads = u64(block[0]) * block[1] * block[2],
              ctas = u64(grid[0]) * grid[1] * grid[2];
    expect(threads >= 1 && threads <= 1024,
           "launch: expected 1 to 1024 threads per block, got " + std::to_string(threads));
    expect(ctas >= 1 && ctas <= 65536,
           "launch: expected 1 to 65536 blocks, got " + std::to_string(ctas));
    auto launch = std::make_unique<Launch>();
    std::tie(launch->module, launch->kernel) = found->second;
    expect(parameters.size() == launch->kernel->parameter_bytes,
           "launch: expected " + std::to_string(launch->kernel->parameter_bytes) +
               " bytes of parameters for '" + kernel + "', got " +
               std::to_string(parameters.size()));
    const u64 shared = u64(launch->kernel->shared_bytes) + shared_bytes;
    expect(shared <= 232448,
           "launch: expected at most 232448 bytes of shared memory, got " + std::to_string(shared));
    launch->rank = rank;
    launch->device = on_host ? host_of(rank) : rank;
    launch->stream = stream;
    launch->number = num_launches_++;
    launch->grid = grid;
    launch->block = block;
    launch->dynamic_shared = shared_bytes;
    launch->parameters = std::move(parameters);
    launch->counts = &counts_[kernel];
    ++launch->counts->launches;
    if (races_) launch->knowledge = is_inside_call() ? *caller_ : races_->host(rank);
    streams_[{rank, stream}].push_back(std::move(launch));
    made_progress();
    changed_.notify_all();
}

void Machine::meet() {
    const HostLock lock(*this);
    if (races_) races_->meet();
}

void Machine::set_intrinsic(const std::string& name, Intrinsic intrinsic) {
    const HostLock lock(*this);
    intrinsics_[name] = std::move(intrinsic);
}

void Machine::call_intrinsic(const std::string& name, Call& call, const Knowledge& knowledge) {
    const auto found = intrinsics_.find(name);
    if (found == intrinsics_.end())
        throw Fault("call: expected an intrinsic for '" + name + "'; register one with on_call");
    caller_ = &knowledge;
    calling_thread_ = std::this_thread::get_id();
    try {
        found->second(call);
    } catch (...) {
        calling_thread_ = std::thread::id();
        throw;
    }
    calling_thread_ = std::thread::id();
}

bool Machine::is_idle(int rank, int stream) const {
    for (const auto& [key, queue] : streams_)
        if ((rank < 0 || key.first == rank) && (stream < 0 || key.second == stream) &&
            !queue.empty())
            return false;
    return true;
}

void Machine::throw_if_broken() const {
    if (!broken_.empty()) throw Fault(broken_);
}

/// A host whose wait is over counts as one that can launch, however late it wakes up.
bool Machine::all_hosts_wait() const {
    return static_cast<int>(waiting_.size()) >= num_ranks_ &&
           std::none_of(waiting_.begin(), waiting_.end(),
                        [](const Predicate* done) { return (*done)(); });
}

/// Let the machine run, by this thread or another, until `done`.
void Machine::drive(int rank, const Predicate& done) {
    using clock = std::chrono::steady_clock;
    const auto seconds = [](double count) {
        return std::chrono::duration_cast<clock::duration>(std::chrono::duration<double>(count));
    };
    std::unique_lock lock(mutex_);
    const Waiting waiting(*this, done);
    // All ranks begin together if they come soon, so that one seed gives one interleaving.
    const auto arrival = clock::now();
    while (rank >= 0 && static_cast<int>(waiting_.size()) < num_ranks_ && !is_driven_ && !done() &&
           broken_.empty() && clock::now() - arrival < seconds(options_.grace_seconds))
        changed_.wait_for(lock, seconds(options_.grace_seconds / 4));
    u64 stuck_at = ~u64{0};  // the last progress when the machine got stuck
    auto stuck_since = clock::now();
    while (!done()) {
        throw_if_broken();
        if (is_driven_ || stuck_at == last_progress_) {
            changed_.wait_for(lock, std::chrono::milliseconds(20));
            // Stuck is a hang once no host is left that could launch something.
            if (!done() && !is_driven_ && stuck_at == last_progress_ &&
                (rank < 0 || all_hosts_wait() ||
                 clock::now() - stuck_since > seconds(options_.host_seconds)))
                broken_ = "hang: nothing can move any more; " + describe_waiting();
            continue;
        }
        is_driven_ = true;
        Progress progress = Progress::kIdle;
        try {
            progress = run_slice(kSliceInstructions);
        } catch (const std::exception& error) {
            broken_ = error.what();
        }
        is_driven_ = false;
        if (progress == Progress::kStuck) stuck_at = last_progress_, stuck_since = clock::now();
        changed_.notify_all();
        lock.unlock();
        let_hosts_in();
        lock.lock();
    }
    throw_if_broken();
}

void Machine::run() {
    drive(-1, [&] { return is_idle(-1, -1); });
    const std::lock_guard lock(mutex_);
    if (!races_) return;
    for (const auto& launch : retired_) races_->host_synchronized(launch->rank, launch->knowledge);
    races_->meet();
    retired_.clear();
}

void Machine::synchronize(int rank, int stream) {
    drive(rank, [&] { return is_idle(rank, stream); });
    const std::lock_guard lock(mutex_);
    std::erase_if(retired_, [&](const std::unique_ptr<Launch>& launch) {
        if (launch->rank != rank || (stream >= 0 && launch->stream != stream)) return false;
        if (races_) races_->host_synchronized(rank, launch->knowledge);
        return true;
    });
}

bool Machine::advance(int rank, u64 max_instructions) {
    let_hosts_in();
    std::unique_lock lock(mutex_);
    throw_if_broken();
    if (is_driven_) return true;
    try {
        if (run_slice(max_instructions) == Progress::kStuck && num_ranks_ == 1)
            throw Fault("hang: nothing can move any more; " + describe_waiting());
    } catch (const std::exception& error) {
        broken_ = error.what();
        throw;
    }
    changed_.notify_all();
    // Whoever waits now waits for a launch: leave the processor to who is to make it.
    if (steps_ - last_progress_ > kSliceInstructions)
        changed_.wait_for(lock, std::chrono::milliseconds(2));
    return !is_idle(rank, -1);
}

void Machine::report(const std::string& kind, const std::string& key, const std::string& text) {
    if (reports_.size() < 200 && reported_.insert(kind + key).second)
        reports_.push_back({kind, text});
}

std::string Machine::describe(i32 number) const {
    if (number < 0) return "host";
    const Site& site = sites_.at(size_t(number));
    std::string text = site.kernel->name + " ptx:" + std::to_string(site.instruction->line);
    const std::string source = site.module->describe(*site.instruction);
    return source.empty() ? text : text + ", " + source;
}

std::string Machine::where(const Warp& warp, int lane, const Instruction& instruction) const {
    const Cta& cta = *warp.cta;
    std::ostringstream text;
    text << "rank " << cta.launch->rank << " block " << cta.index[0] << "," << cta.index[1] << ","
         << cta.index[2] << " warp " << warp.index << " lane " << lane << " ("
         << describe(instruction.site) << ")";
    return text.str();
}

void Machine::fault(const Warp& warp,
                    int lane,
                    const Instruction& instruction,
                    const std::string& what) {
    const std::string& opcode = warp.cta->launch->module->opcodes.at(size_t(instruction.opcode));
    throw Fault(opcode + ": " + what + "; " + where(warp, lane, instruction));
}

}  // namespace ptx
