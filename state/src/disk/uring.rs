//! The disk through io_uring: one ring of one thread, polled from its loop.
//!
//! Invariants: operations in flight never exceed the depth, which neither queue can overflow; a
//! completion names its slot and the slot's generation, and one that nobody waits for means that
//! memory may have been written that is no longer ours, so the process stops; nothing is linked (a
//! short write would cancel what follows). A buffer in flight belongs to its slot: dropping the
//! ring waits for the kernel, and leaks the buffer rather than free it too early.
//!
//! Called through [`super::Disk`].

use std::fs;
use std::io;
use std::marker::PhantomData;
use std::path::Path;
use std::process;
use std::time::{Duration, Instant};

use io_uring::types::{Fd, FsyncFlags, SubmitArgs, Timespec};
use io_uring::{IoUring, Probe, opcode, squeue};

use super::files::Files;
use super::job::{Call, Job, Next};
use super::{DEPTH_MAX, Disk, Disturbance, Done, Op, Pool, Ticket, list_folder};

/// How long dropping waits for the kernel before it leaks what is in flight.
const DROP_PATIENCE: Duration = Duration::from_secs(30);

/// Where the kernel says whether io_uring may be used.
const SYSCTL: &str = "/proc/sys/kernel/io_uring_disabled";

/// An operation in flight, or room for one.
#[derive(Debug, Default)]
struct Slot {
    generation: u32,
    job: Option<Job>,
}

/// The disk and its ring. It stays on the thread that made it: the kernel refuses others.
pub struct Uring {
    ring: IoUring,
    slots: Vec<Slot>,
    free: Vec<u32>,
    files: Files,
    submitted: u64,
    /// Refused on submission: given out by the next poll.
    ready: Vec<Done>,
    registered: Option<Pool>,
    disturbance: Disturbance,
    only_here: PhantomData<*const ()>,
}

impl std::fmt::Debug for Uring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Uring({} in flight of {})", self.in_flight(), self.slots.len())
    }
}

/// A ring with what this kernel has of the flags for one thread that polls.
fn build(depth: u32) -> io::Result<IoUring> {
    let queue = |builder: &mut io_uring::Builder| builder.setup_cqsize(2 * depth).build(depth);
    let mut best = IoUring::builder();
    best.setup_single_issuer().setup_defer_taskrun().setup_coop_taskrun().setup_taskrun_flag();
    match queue(&mut best) {
        // Linux before 6.1.
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => queue(&mut IoUring::builder()),
        other => other,
    }
}

/// Refuses a kernel whose io_uring lacks what this disk uses.
fn check_features(ring: &IoUring) -> io::Result<()> {
    let mut probe = Probe::new();
    ring.submitter().register_probe(&mut probe)?;
    let needed = [
        opcode::OpenAt::CODE,
        opcode::Write::CODE,
        opcode::Read::CODE,
        opcode::WriteFixed::CODE,
        opcode::ReadFixed::CODE,
        opcode::Fsync::CODE,
        opcode::Fallocate::CODE,
        opcode::Close::CODE,
        opcode::RenameAt::CODE,
        opcode::UnlinkAt::CODE,
    ];
    let has_calls = needed.iter().all(|code| probe.is_supported(*code));
    let parameters = ring.params();
    if has_calls && parameters.is_feature_ext_arg() && parameters.is_feature_nodrop() {
        return Ok(());
    }
    let why = "the kernel's io_uring is too old (Linux 5.11 has what is needed)";
    Err(io::Error::new(io::ErrorKind::Unsupported, why))
}

impl Uring {
    /// A ring for at most `depth` operations in flight (1 to [`DEPTH_MAX`]). The error says why the
    /// kernel refused and what to do.
    pub fn new(depth: usize) -> io::Result<Self> {
        Self::disturbed(depth, Disturbance::default())
    }

    /// As [`Uring::new`], with a kernel that makes difficulties: for tests.
    pub fn disturbed(depth: usize, disturbance: Disturbance) -> io::Result<Self> {
        let depth = depth.clamp(1, DEPTH_MAX) as u32;
        let ring = build(depth).and_then(|ring| check_features(&ring).map(|()| ring));
        let ring = ring.map_err(|e| explain(e, fs::read_to_string(SYSCTL).ok().as_deref()))?;
        assert!(ring.params().cq_entries() >= depth, "each operation in flight has its place");
        Ok(Self {
            ring,
            slots: (0..depth).map(|_| Slot::default()).collect(),
            free: (0..depth).rev().collect(),
            files: Files::default(),
            submitted: 0,
            ready: Vec::new(),
            registered: None,
            disturbance,
            only_here: PhantomData,
        })
    }

    /// Jobs that the kernel has or is about to get.
    fn busy(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Queues the call that a slot's job names.
    fn queue(&mut self, slot: u32) {
        let place = &mut self.slots[slot as usize];
        let job = place.job.as_mut().expect("a queued slot has a job");
        let call = job.call(self.disturbance.most());
        let pool = self.registered.as_ref();
        let is_registered = job.buffer().zip(pool).is_some_and(|(buffer, pool)| buffer.is_of(pool));
        let data = u64::from(place.generation) << 32 | u64::from(slot);
        let entry = entry(call, is_registered).user_data(data);
        // SAFETY: what the entry points to belongs to the slot's job, which stays until its
        // completion was seen (`complete`), or is leaked (`drop`).
        let pushed = unsafe { self.ring.submission().push(&entry) };
        pushed.expect("the queue has room for each slot");
    }

    /// Hands what is queued to the kernel and lets it run what it deferred to us. One load when
    /// there is neither.
    fn enter(&mut self) {
        let queue = self.ring.submission();
        let is_needed = !queue.is_empty() || queue.taskrun();
        drop(queue);
        if is_needed {
            tolerate(self.ring.submit());
        }
    }

    /// Takes one completion.
    fn reap(&mut self, done: &mut Vec<Done>) -> bool {
        let Some(entry) = self.ring.completion().next() else { return false };
        let (slot, generation) = (entry.user_data() as u32, (entry.user_data() >> 32) as u32);
        let place = self.slots.get_mut(slot as usize);
        let job = place.filter(|place| place.generation == generation);
        let Some(job) = job.and_then(|place| place.job.take()) else {
            stop(&format!(
                "completion of slot {slot}, generation {generation}: nobody waits for it"
            ))
        };
        let result = self.disturbance.result(job.is_repeatable(), entry.result());
        match job.advance(result) {
            Next::Call(job) => {
                self.slots[slot as usize].job = Some(job);
                self.queue(slot);
            }
            Next::End(finished) => {
                let place = &mut self.slots[slot as usize];
                place.generation = place.generation.wrapping_add(1);
                self.free.push(slot);
                done.push(finished.done(&mut self.files));
            }
        }
        true
    }
}

/// The queue's entry for a call.
fn entry(call: Call, is_registered: bool) -> squeue::Entry {
    let here = Fd(libc::AT_FDCWD);
    match call {
        Call::Open { path, flags } => {
            opcode::OpenAt::new(here, path).flags(flags).mode(0o600).build()
        }
        Call::Reserve { fd, bytes } => opcode::Fallocate::new(Fd(fd), bytes).build(),
        Call::Write { fd, from, bytes, at } if is_registered => {
            opcode::WriteFixed::new(Fd(fd), from, bytes, 0).offset(at).build()
        }
        Call::Write { fd, from, bytes, at } => {
            opcode::Write::new(Fd(fd), from, bytes).offset(at).build()
        }
        Call::Read { fd, into, bytes, at } if is_registered => {
            opcode::ReadFixed::new(Fd(fd), into, bytes, 0).offset(at).build()
        }
        Call::Read { fd, into, bytes, at } => {
            opcode::Read::new(Fd(fd), into, bytes).offset(at).build()
        }
        Call::Sync { fd } => opcode::Fsync::new(Fd(fd)).flags(FsyncFlags::empty()).build(),
        Call::Close { fd } => opcode::Close::new(Fd(fd)).build(),
        Call::Rename { from, to } => opcode::RenameAt::new(here, from, here, to).build(),
        Call::Unlink { path } => opcode::UnlinkAt::new(here, path).build(),
    }
}

/// Some refusals of the kernel pass: what was queued stays queued for the next time.
fn tolerate(entered: io::Result<usize>) {
    if let Err(e) = entered {
        let passes = [libc::EINTR, libc::EAGAIN, libc::EBUSY, libc::ETIME];
        if !e.raw_os_error().is_some_and(|code| passes.contains(&code)) {
            stop(&format!("io_uring_enter: {e}"));
        }
    }
}

/// Ends the process: going on could corrupt memory that others trust.
fn stop(why: &str) -> ! {
    eprintln!("testudo: the io_uring of this thread cannot be trusted any more: {why}. Stopping.");
    process::abort()
}

/// Says why the kernel refused a ring and what to do.
fn explain(error: io::Error, sysctl: Option<&str>) -> io::Error {
    let why = match (error.raw_os_error(), sysctl.map(str::trim)) {
        (Some(libc::ENOSYS), _) => {
            "the kernel was built without it, or a seccomp filter hides it; allow io_uring_setup, \
             io_uring_enter and io_uring_register in the container's seccomp profile"
                .to_owned()
        }
        (Some(libc::EPERM), Some(setting @ ("1" | "2"))) => format!(
            "the administrator has disabled it (kernel.io_uring_disabled = {setting}); \
             `sysctl kernel.io_uring_disabled=0` enables it, or with 1 membership in the group \
             kernel.io_uring_group"
        ),
        (Some(libc::EPERM | libc::EACCES), _) => {
            "a seccomp filter refuses it, as container runtimes do; allow io_uring_setup, \
             io_uring_enter and io_uring_register in the container's seccomp profile"
                .to_owned()
        }
        (Some(libc::ENOMEM), _) => {
            "the limit of locked memory is too small for a ring; raise LimitMEMLOCK= or `ulimit -l`"
                .to_owned()
        }
        _ => "see the error".to_owned(),
    };
    io::Error::new(error.kind(), format!("io_uring is not available ({error}): {why}"))
}

impl Disk for Uring {
    fn submit(&mut self, op: Op) -> Result<Ticket, Op> {
        if self.in_flight() >= self.slots.len() {
            return Err(op);
        }
        self.submitted += 1;
        let ticket = Ticket(self.submitted);
        match Job::new(ticket, op, &mut self.files) {
            Ok(job) => {
                let slot = self.free.pop().expect("fewer in flight than slots");
                self.slots[slot as usize].job = Some(job);
                self.queue(slot);
            }
            Err(done) => self.ready.push(done),
        }
        Ok(ticket)
    }

    fn poll(&mut self, done: &mut Vec<Done>) {
        if self.in_flight() == 0 {
            return;
        }
        done.append(&mut self.ready);
        self.enter();
        while self.reap(done) {}
        // Continued transfers go out at once.
        self.enter();
    }

    fn wait(&mut self, patience: Duration) {
        if self.busy() == 0 || !self.ready.is_empty() || !self.ring.completion().is_empty() {
            return;
        }
        let time = Timespec::from(patience);
        tolerate(self.ring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&time)));
    }

    fn in_flight(&self) -> usize {
        self.busy() + self.ready.len()
    }

    fn list(&self, folder: &Path) -> io::Result<Vec<(String, u64)>> {
        list_folder(folder)
    }

    fn kind(&self) -> &'static str {
        "io_uring"
    }

    fn register(&mut self, pool: &Pool) -> bool {
        if self.registered.is_some() || self.busy() > 0 {
            return false;
        }
        let (base, bytes) = pool.range();
        let piece = libc::iovec { iov_base: base.as_ptr().cast(), iov_len: bytes };
        // SAFETY: the pool is kept as long as the ring, and with it the mapping.
        let registered = unsafe { self.ring.submitter().register_buffers(&[piece]) }.is_ok();
        self.registered = registered.then(|| pool.clone());
        registered
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        let until = Instant::now() + DROP_PATIENCE;
        let mut done = Vec::new();
        while self.in_flight() > 0 && Instant::now() < until {
            self.poll(&mut done);
            done.clear();
            self.wait(Duration::from_millis(100));
        }
        if self.in_flight() > 0 {
            // The kernel may still use them: the memory is never freed.
            std::mem::forget(std::mem::take(&mut self.slots));
            std::mem::forget(std::mem::take(&mut self.files));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn explained(code: i32, sysctl: Option<&str>) -> String {
        explain(io::Error::from_raw_os_error(code), sysctl).to_string()
    }

    #[test]
    fn a_refused_ring_says_what_to_do() {
        let by_sysctl = explained(libc::EPERM, Some("2\n"));
        assert!(by_sysctl.contains("kernel.io_uring_disabled = 2"), "{by_sysctl}");
        let by_filter = explained(libc::EPERM, Some("0\n"));
        assert!(by_filter.contains("seccomp"), "{by_filter}");
        assert!(explained(libc::ENOSYS, None).contains("built without"), "no system call");
        assert!(explained(libc::ENOMEM, Some("0")).contains("LimitMEMLOCK"), "locked memory");
    }
}
