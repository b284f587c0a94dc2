//! Haste: the supervisor, and a worker until its first commit, run before others that want their
//! core.
//!
//! A death is seen, and the successor attaches, while peers spin and the kernel takes the dead
//! process's memory apart: with fair shares of the cores, half of a recovery is waiting for a turn.
//! Where the machine allows it (root, CAP_SYS_NICE or RLIMIT_RTPRIO), the supervisor's thread takes
//! the lowest real-time priority; elsewhere a short time slice, which brings its turns forward
//! without more of them (Linux 6.12; without effect before). A worker inherits either, and gives it
//! up after its first step; a standby that takes over runs even before the supervisor. A step that
//! never ends is throttled by the kernel, as every real-time thread is.
//!
//! Invariants: who has chosen a scheduling policy keeps it; what the user's code starts has the
//! usual priority; nothing here is needed to be correct, so no failure is reported.
//!
//! Called by `recover` (the supervisor's thread), `entry` and `step` (the worker), `standby`.

#![expect(unsafe_code, reason = "scheduling calls")]

use std::marker::PhantomData;

/// Nanoseconds of the short slice: the shortest that the kernel takes.
const SLICE_NS: u64 = 100_000;

/// `SCHED_FLAG_RESET_ON_FORK`: threads and processes that are started do not inherit.
const FOR_ITSELF: u64 = 1;

/// The kernel's `struct sched_attr`, in its first version.
#[repr(C)]
#[derive(Debug, Default)]
struct SchedAttr {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

/// The calling thread's raised priority, inherited by all that it starts; given up when dropped.
#[derive(Debug)]
pub(crate) struct Haste {
    of_this_thread: PhantomData<*const ()>,
}

impl Haste {
    /// Raises the calling thread's priority; `None` where it has a policy of its own, or the kernel
    /// refuses.
    pub(crate) fn begin() -> Option<Self> {
        (policy() == libc::SCHED_OTHER && (real_time(1, 0) || slice(SLICE_NS, 0)))
            .then_some(Self { of_this_thread: PhantomData })
    }
}

impl Drop for Haste {
    fn drop(&mut self) {
        slice(0, 0);
    }
}

/// In a worker that inherited haste: what the user's code starts shall not.
pub(crate) fn inherited() {
    if policy() == libc::SCHED_RR {
        real_time(1, FOR_ITSELF);
    } else {
        slice(SLICE_NS, FOR_ITSELF);
    }
}

/// In a worker that inherited haste: its first step is done. The flag stays: taking it back needs a
/// privilege.
pub(crate) fn end() {
    slice(0, FOR_ITSELF);
}

/// In a successor that was prepared at the usual priority, now that its turn has come: as a worker
/// that inherited haste.
pub(crate) fn again() {
    if policy() == libc::SCHED_OTHER && !real_time(1, FOR_ITSELF) {
        slice(SLICE_NS, FOR_ITSELF);
    }
}

/// In a standby: the supervisor hears of the same death, and its books can wait.
pub(crate) fn ahead() {
    if policy() == libc::SCHED_OTHER && !real_time(2, FOR_ITSELF) {
        again();
    }
}

/// In a worker that gives way: all that is left for it to do is to end, and its successor wants the
/// core. Whoever has chosen a policy keeps it.
pub(crate) fn give_way() {
    if policy() == libc::SCHED_OTHER {
        set(SchedAttr {
            policy: libc::SCHED_IDLE as u32,
            flags: FOR_ITSELF,
            ..SchedAttr::default()
        });
    }
}

/// The calling thread's scheduling policy.
fn policy() -> i32 {
    // SAFETY: plain system call on the calling thread.
    let policy = unsafe { libc::sched_getscheduler(0) };
    // What is not inherited is said in the same number.
    policy & !libc::SCHED_RESET_ON_FORK
}

/// Gives the calling thread a real-time priority; the lowest is 1.
fn real_time(priority: u32, flags: u64) -> bool {
    set(SchedAttr { policy: libc::SCHED_RR as u32, flags, priority, ..SchedAttr::default() })
}

/// Gives the calling thread a fair share, in slices of so many nanoseconds; 0 is the usual.
fn slice(runtime: u64, flags: u64) -> bool {
    // SAFETY: plain system call on the calling thread.
    let nice = unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
    set(SchedAttr {
        policy: libc::SCHED_OTHER as u32,
        flags,
        nice,
        runtime,
        ..SchedAttr::default()
    })
}

fn set(attr: SchedAttr) -> bool {
    let attr = SchedAttr { size: size_of::<SchedAttr>() as u32, ..attr };
    // SAFETY: attr is a valid place of the size that it names; the call acts on this thread alone.
    unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attr, 0) == 0 }
}
