//! What a worker does while it dies: it keeps, in its own segment, the signal or the panic, the
//! address, and the return addresses on its stack.
//!
//! Invariants: the handlers run on a stack of their own, so the end of the other one is told too;
//! they store plain words and call nothing that takes a lock or memory, but for the walk up the
//! stack, which comes last and is cut short by an alarm; then the signal takes its course. A signal
//! that another process sent is told apart from one of the worker's own doing (R17).
//!
//! Called by `attach`, once the segment is this process's own; a standby prepares the handlers
//! before that.

#![expect(unsafe_code, reason = "signal handlers, the linker's symbols, walking up a stack")]

use crate::metrics;
use testudo_shm::last_words::LastWords;
use testudo_shm::obituary::{Kind, Obituary};
use testudo_shm::primitive::{AtomicBool, AtomicUsize, Ordering};

/// Where the handlers write; 0 before they may.
static PAGE: AtomicUsize = AtomicUsize::new(0);

/// Signals by which a process ends itself.
const FATAL: [libc::c_int; 6] =
    [libc::SIGSEGV, libc::SIGBUS, libc::SIGABRT, libc::SIGILL, libc::SIGFPE, libc::SIGSYS];

/// Bytes of the handlers' stack.
const STACK_BYTES: usize = 128 << 10;

/// A fault so near to the stack pointer is the stack's end.
const NEAR_STACK: u64 = 1 << 20;

/// Seconds that the walk up the stack may take.
const WALK_S: libc::c_uint = 1;

unsafe extern "C" {
    /// The first byte of the executable, and the first one behind its code: from the linker.
    static __executable_start: u8;
    static etext: u8;
}

/// Where this process's executable lies.
pub(crate) fn executable() -> std::ops::Range<u64> {
    (&raw const __executable_start).addr() as u64..(&raw const etext).addr() as u64
}

/// From here on this process's death is told in its own segment.
pub(crate) fn watch(obituary: &'static Obituary, words: &'static LastWords) {
    obituary.begin(std::process::id(), executable().start);
    metrics::set_panic_page(words, obituary);
    PAGE.store(std::ptr::from_ref(obituary).addr(), Ordering::Release);
    prepare();
}

/// Sets the handlers up, once. They tell nothing before there is a segment to tell it in.
pub(crate) fn prepare() {
    static IS_PREPARED: AtomicBool = AtomicBool::new(false);
    if IS_PREPARED.swap(true, Ordering::Relaxed) {
        return;
    }
    // SAFETY: a fresh mapping touches nothing that exists. Its pages come when the stack is used.
    let stack = unsafe {
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        libc::mmap(std::ptr::null_mut(), STACK_BYTES, prot, flags, -1, 0)
    };
    // SAFETY: the stack lives for the rest of the process; the handler has the signature that
    // SA_SIGINFO asks for, and calls nothing that a signal handler may not.
    unsafe {
        if stack != libc::MAP_FAILED {
            let stack = libc::stack_t { ss_sp: stack, ss_flags: 0, ss_size: STACK_BYTES };
            libc::sigaltstack(&raw const stack, std::ptr::null_mut());
        }
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = (on_signal as extern "C" fn(_, _, _)) as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigemptyset(&raw mut action.sa_mask);
        for signal in FATAL {
            libc::sigaction(signal, &raw const action, std::ptr::null_mut());
        }
        libc::atexit(on_exit);
    }
}

fn page() -> Option<&'static Obituary> {
    let page = std::ptr::with_exposed_provenance::<Obituary>(PAGE.load(Ordering::Acquire));
    // SAFETY: `watch` stored the address of a page that is mapped for good, or it is 0.
    unsafe { page.as_ref() }
}

extern "C" fn on_exit() {
    if let Some(page) = page() {
        page.say(Kind::Exit);
    }
}

extern "C" fn on_signal(
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    // SAFETY: the kernel hands valid structures to a handler with SA_SIGINFO; what is called is
    // async-signal-safe.
    unsafe {
        let code = (*info).si_code;
        if let Some(page) = page() {
            let (pc, sp) = registers(context);
            let sender = if code > 0 { 0 } else { sender(&*info) };
            let address = if code > 0 { (*info).si_addr().addr() as u64 } else { 0 };
            let is_fault = signal == libc::SIGSEGV || signal == libc::SIGBUS;
            let near = sp.saturating_sub(NEAR_STACK)..sp.saturating_add(NEAR_STACK / 16);
            page.frame(pc);
            page.signal(signal, address, sender, is_fault && code > 0 && near.contains(&address));
            libc::signal(libc::SIGALRM, libc::SIG_DFL);
            libc::alarm(WALK_S);
            walk(page, pc);
        }
        libc::signal(signal, libc::SIG_DFL);
        // A fault comes again by itself when the instruction is tried again.
        if code <= 0 {
            libc::raise(signal);
        }
    }
}

/// The process that sent a signal; 0 when it was this one.
///
/// # Safety
/// The signal was sent by a process.
unsafe fn sender(info: &libc::siginfo_t) -> u32 {
    // SAFETY: promised by the caller.
    let pid = unsafe { info.si_pid() };
    match u32::try_from(pid) {
        // SAFETY: plain system call.
        Ok(_) if pid == unsafe { libc::getpid() } => 0,
        // One of another namespace shows as 0.
        Ok(0) | Err(_) => u32::MAX,
        Ok(pid) => pid,
    }
}

/// Instruction and stack pointer where the signal came.
///
/// # Safety
/// `context` is what the kernel handed to the handler.
unsafe fn registers(context: *mut libc::c_void) -> (u64, u64) {
    // SAFETY: promised by the caller.
    let machine = unsafe { &(*context.cast::<libc::ucontext_t>()).uc_mcontext };
    #[cfg(target_arch = "x86_64")]
    let (pc, sp) = {
        let register = |index: libc::c_int| machine.gregs[index as usize].cast_unsigned();
        (register(libc::REG_RIP), register(libc::REG_RSP))
    };
    #[cfg(target_arch = "aarch64")]
    let (pc, sp) = (machine.pc, machine.sp);
    (pc, sp)
}

/// What the unwinder hands to its callback.
#[repr(C)]
struct Context {
    _opaque: [u8; 0],
}

unsafe extern "C-unwind" {
    fn _Unwind_Backtrace(
        each: extern "C-unwind" fn(*mut Context, *mut libc::c_void) -> libc::c_int,
        argument: *mut libc::c_void,
    ) -> libc::c_int;
    fn _Unwind_GetIP(context: *mut Context) -> usize;
}

struct Walk {
    page: &'static Obituary,
    /// The frames before this one are the handler's.
    pc: u64,
    is_beyond: bool,
}

/// Notes the return addresses above `pc`.
fn walk(page: &'static Obituary, pc: u64) {
    let mut walk = Walk { page, pc, is_beyond: false };
    // SAFETY: the callback does what the unwinder's interface asks for; `walk` outlives the call.
    // The unwinder finds its tables without locks (_dl_find_object); where it does not, the alarm
    // ends a process that is dead in any case.
    unsafe { _Unwind_Backtrace(on_frame, (&raw mut walk).cast()) };
}

extern "C-unwind" fn on_frame(context: *mut Context, argument: *mut libc::c_void) -> libc::c_int {
    const GO_ON: libc::c_int = 0;
    const STOP: libc::c_int = 5;
    // SAFETY: `walk` gave a pointer to its own value; the context is the unwinder's.
    let (walk, address) = unsafe { (&mut *argument.cast::<Walk>(), _Unwind_GetIP(context) as u64) };
    if !walk.is_beyond {
        walk.is_beyond = address == walk.pc;
        return GO_ON;
    }
    if walk.page.frame(address) { GO_ON } else { STOP }
}
