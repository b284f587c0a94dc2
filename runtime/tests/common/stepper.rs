//! A worker under a debugger: every life of it from its first instruction on, stopped where it
//! begins to attach and where each step begins (`TESTUDO_TRAP`), led to any instruction in between
//! by single steps or by a breakpoint, and killed there.
//!
//! All calls of a [`Stepper`] come from the thread that made it. A tracer that dies takes what it
//! traces with it.

#![expect(unsafe_code, reason = "ptrace and waitpid")]

use super::process::{children, stat};
use super::{PATIENCE, program::Started};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

/// The supervisor and the present life of one of its workers.
pub struct Stepper {
    worker: usize,
    /// The supervisor's threads.
    threads: Vec<i32>,
    /// Processes that were just started, up to their exec.
    newborn: Vec<i32>,
    pub life: Option<Life>,
    job: u32,
    /// Where this thread may run again afterwards.
    cores: libc::cpu_set_t,
}

/// One life of the worker, stopped.
pub struct Life {
    pub pid: i32,
    memory: File,
    modules: Vec<Module>,
    /// Where a breakpoint is, and the byte that was there.
    armed: Option<(u64, u8)>,
}

/// A file that the worker executes.
struct Module {
    base: u64,
    /// What of it can be executed, as addresses.
    code: std::ops::Range<u64>,
}

/// An instruction, wherever its file is mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Instruction {
    /// 0 is the program; the others are libraries, in the order in which they are mapped.
    pub module: u32,
    pub offset: u64,
}

/// Why a life has stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// It begins to attach, or another step.
    Begin,
    /// It is about to execute the instruction with the breakpoint.
    Breakpoint,
    /// It is dead: the status that it was waited for with.
    Gone(i32),
}

/// What became of one instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Single {
    /// This one is next; `None` outside the program and its libraries.
    At(Option<Instruction>),
    /// A step begins.
    Begin,
    /// The process has ended.
    Gone,
}

const OPTIONS: i32 = libc::PTRACE_O_TRACEFORK
    | libc::PTRACE_O_TRACEVFORK
    | libc::PTRACE_O_TRACEEXEC
    | libc::PTRACE_O_EXITKILL;

/// The byte of a breakpoint (`int3`).
const BREAK: u8 = 0xCC;

/// PTRACE_SINGLEBLOCK, which the library does not name.
const SINGLE_BLOCK: libc::c_uint = 33;

/// Where the instruction pointer stands among the registers.
const POINTER: usize = std::mem::offset_of!(libc::user_regs_struct, rip);

fn ptrace(request: libc::c_uint, thread: i32, address: usize, data: usize) -> io::Result<i64> {
    // SAFETY: requests that are used here either take numbers or write to what `data` points to,
    // which the caller made for that.
    let done = unsafe { libc::ptrace(request, thread, address, data) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(done) }
}

/// How a thread has stopped or ended; `None` while it runs. An error: it is gone.
fn look(thread: i32, block: bool) -> io::Result<Option<i32>> {
    let mut status = 0;
    let flags = libc::__WALL | if block { 0 } else { libc::WNOHANG };
    // SAFETY: status is a valid place for the result.
    match unsafe { libc::waitpid(thread, &raw mut status, flags) } {
        0 => Ok(None),
        got if got == thread => Ok(Some(status)),
        _ => Err(io::Error::last_os_error()),
    }
}

fn event_of(status: i32) -> i32 {
    status >> 16
}

impl Stepper {
    /// Traces the supervisor of a job, whose worker has been started with `TESTUDO_TRAP`. An error
    /// where that is not allowed.
    pub fn of(job: &Started, worker: usize) -> io::Result<Self> {
        let name = format!("testudo-w{worker}");
        let first = super::wait_for("the worker to be stepped", || descendant(job.pid(), &name));
        let supervisor = stat(first).expect("a worker that runs").parent;
        let (threads, newborn, cores) = (Vec::new(), Vec::new(), cores_of(0));
        let mut this = Self { worker, threads, newborn, life: None, job: job.pid(), cores };
        for (thread, _) in super::process::threads(supervisor) {
            ptrace(libc::PTRACE_SEIZE, thread as i32, 0, OPTIONS as usize)?;
            this.threads.push(thread as i32);
        }
        // Two that take turns do so twenty times faster on one core.
        run_on(0, &one_of(&cores));
        // The first life was started unseen: it makes room for one that is seen.
        signal(first as i32, libc::SIGKILL);
        Ok(this)
    }

    /// Waits for a successor and leads it to where it begins to attach; false when the job is over.
    pub fn next_life(&mut self) -> bool {
        let begun = Instant::now();
        while self.life.is_none() {
            if stat(self.job).is_none_or(|stat| stat.state == 'Z') {
                return false;
            }
            assert!(begun.elapsed() < PATIENCE, "no successor");
            if !self.tend() {
                std::thread::sleep(Duration::from_micros(20));
            }
        }
        let stop = self.go_on();
        assert_eq!(stop, Stop::Begin, "before the worker began to attach");
        if let Some(life) = &mut self.life {
            life.modules = modules(life.pid);
        }
        true
    }

    /// Lets the supervisor and what it has just started go on; true when something was done.
    pub fn tend(&mut self) -> bool {
        let mut any = false;
        let mut born = Vec::new();
        self.threads.retain(|&thread| {
            let status = match look(thread, false) {
                Ok(None) => return true,
                Ok(Some(status)) if libc::WIFSTOPPED(status) => status,
                _ => return false,
            };
            any = true;
            let mut pass_on = 0;
            match event_of(status) {
                0 => pass_on = libc::WSTOPSIG(status) as usize,
                libc::PTRACE_EVENT_FORK | libc::PTRACE_EVENT_VFORK => {
                    let mut pid: libc::c_ulong = 0;
                    let at = (&raw mut pid).addr();
                    if ptrace(libc::PTRACE_GETEVENTMSG, thread, 0, at).is_ok() {
                        born.push(pid as i32);
                    }
                }
                _ => {}
            }
            // One that was killed in the meantime is seen at the next turn.
            let _ = ptrace(libc::PTRACE_CONT, thread, 0, pass_on);
            true
        });
        self.newborn.append(&mut born);
        any | self.tend_newborn()
    }

    fn tend_newborn(&mut self) -> bool {
        let (mut any, worker) = (false, self.worker);
        let mut life = None;
        self.newborn.retain(|&pid| {
            let status = match look(pid, false) {
                Ok(None) => return true,
                Ok(Some(status)) if libc::WIFSTOPPED(status) => status,
                _ => return false,
            };
            any = true;
            if event_of(status) == libc::PTRACE_EVENT_EXEC {
                if is_worker(pid, worker) {
                    life = Some(Life::new(pid));
                } else {
                    let _ = ptrace(libc::PTRACE_DETACH, pid, 0, 0);
                }
                return false;
            }
            let is_signal = event_of(status) == 0 && libc::WSTOPSIG(status) != libc::SIGSTOP;
            let pass_on = if is_signal { libc::WSTOPSIG(status) as usize } else { 0 };
            let _ = ptrace(libc::PTRACE_CONT, pid, 0, pass_on);
            true
        });
        if life.is_some() {
            self.life = life;
        }
        any
    }

    /// Lets the life go on to where it stops next.
    pub fn go_on(&mut self) -> Stop {
        let life = self.life.as_mut().expect("a life");
        life.step_over();
        let pid = life.pid;
        let mut pass_on = 0;
        let begun = Instant::now();
        loop {
            let _ = ptrace(libc::PTRACE_CONT, pid, 0, pass_on);
            let status = loop {
                match look(pid, false) {
                    Ok(Some(status)) => break status,
                    Ok(None) => {}
                    Err(error) => panic!("a traced process was lost: {error}"),
                }
                assert!(begun.elapsed() < PATIENCE, "a life that stops nowhere");
                if !self.tend() {
                    std::thread::sleep(Duration::from_micros(5));
                }
            };
            if !libc::WIFSTOPPED(status) {
                self.life = None;
                return Stop::Gone(status);
            }
            let life = self.life.as_mut().expect("the life that was continued");
            match (event_of(status), libc::WSTOPSIG(status)) {
                (0, libc::SIGTRAP) => return life.trapped(),
                (0, signal) => pass_on = signal as usize,
                _ => pass_on = 0,
            }
        }
    }

    /// Kills the life where it stands.
    pub fn kill(&mut self) {
        let Some(life) = self.life.take() else { return };
        signal(life.pid, libc::SIGKILL);
        while look(life.pid, true)
            .is_ok_and(|status| status.is_some_and(|status| libc::WIFSTOPPED(status)))
        {}
    }

    /// Kills the life and looks no more: its successor runs free.
    pub fn let_go(mut self) {
        for &thread in &self.threads {
            let _ = ptrace(libc::PTRACE_INTERRUPT, thread, 0, 0);
            let _ = look(thread, true);
        }
        self.kill();
        for &thread in self.threads.iter().chain(&self.newborn) {
            let _ = ptrace(libc::PTRACE_DETACH, thread, 0, 0);
        }
    }
}

impl Life {
    fn new(pid: i32) -> Self {
        let memory = File::options().read(true).write(true).open(format!("/proc/{pid}/mem"));
        let memory = memory.expect("a traced process can be written to");
        run_on(pid, &cores_of(0));
        Self { pid, memory, modules: Vec::new(), armed: None }
    }

    /// The address of the next instruction.
    fn pointer(&self) -> u64 {
        let mut word: u64 = 0;
        let at = (&raw mut word).addr();
        // The library's function has the word as its result; the system call writes it.
        // SAFETY: the kernel writes one word to `at`.
        let done = unsafe {
            libc::syscall(libc::SYS_ptrace, libc::PTRACE_PEEKUSER, self.pid, POINTER, at)
        };
        assert_eq!(done, 0, "registers of a stopped process");
        word
    }

    /// Executes one instruction.
    pub fn single_step(&mut self) -> Single {
        self.execute(libc::PTRACE_SINGLESTEP)
    }

    /// Executes instructions up to the next one that was jumped to.
    pub fn single_block(&mut self) -> Single {
        self.execute(SINGLE_BLOCK)
    }

    fn execute(&mut self, request: libc::c_uint) -> Single {
        if ptrace(request, self.pid, 0, 0).is_err() {
            return Single::Gone;
        }
        match look(self.pid, true) {
            Ok(Some(status)) if libc::WIFSTOPPED(status) => {}
            _ => return Single::Gone,
        }
        let at = self.at();
        let is_in_program = at.is_some_and(|at| at.module == 0);
        if !is_in_program && self.has_raised() { Single::Begin } else { Single::At(at) }
    }

    /// The instruction that is executed next; `None` outside the program and its libraries.
    pub fn at(&self) -> Option<Instruction> {
        let pointer = self.pointer();
        let module = self.modules.iter().position(|module| module.code.contains(&pointer))?;
        let offset = pointer - self.modules[module].base;
        Some(Instruction { module: module as u32, offset })
    }

    /// Whether the signal that it has stopped for is one that it sent to itself.
    fn has_raised(&self) -> bool {
        let mut info = std::mem::MaybeUninit::<libc::siginfo_t>::zeroed();
        let at = info.as_mut_ptr().addr();
        let is_known = ptrace(libc::PTRACE_GETSIGINFO, self.pid, 0, at).is_ok();
        // SAFETY: all of it are numbers, and the kernel wrote them.
        let info = unsafe { info.assume_init() };
        is_known && info.si_signo == libc::SIGTRAP && info.si_code == libc::SI_TKILL
    }

    /// A SIGTRAP: its own, or the breakpoint's.
    fn trapped(&mut self) -> Stop {
        match self.armed {
            Some((address, _)) if self.pointer() == address + 1 => {
                let done = ptrace(libc::PTRACE_POKEUSER, self.pid, POINTER, address as usize);
                done.expect("registers of a stopped process");
                Stop::Breakpoint
            }
            _ => Stop::Begin,
        }
    }

    fn address(&self, at: Instruction) -> u64 {
        self.modules[at.module as usize].base + at.offset
    }

    /// Puts the breakpoint somewhere else, or nowhere.
    pub fn arm(&mut self, at: Option<Instruction>) {
        if let Some((address, byte)) = self.armed.take() {
            self.memory.write_all_at(&[byte], address).expect("its own code");
        }
        if let Some(at) = at {
            let (address, mut byte) = (self.address(at), [0]);
            self.memory.read_exact_at(&mut byte, address).expect("its own code");
            self.memory.write_all_at(&[BREAK], address).expect("its own code");
            self.armed = Some((address, byte[0]));
        }
    }

    /// Executes the instruction below the breakpoint that it stands at.
    fn step_over(&mut self) {
        let Some((address, byte)) = self.armed else { return };
        if self.pointer() == address {
            self.memory.write_all_at(&[byte], address).expect("its own code");
            let _ = ptrace(libc::PTRACE_SINGLESTEP, self.pid, 0, 0);
            // One that was killed from elsewhere is seen by whoever lets it go on.
            let _ = look(self.pid, true);
            self.memory.write_all_at(&[BREAK], address).expect("its own code");
        }
    }
}

impl Drop for Stepper {
    fn drop(&mut self) {
        run_on(0, &self.cores);
    }
}

/// The cores that a process may run on; 0 is the calling thread.
fn cores_of(pid: i32) -> libc::cpu_set_t {
    // SAFETY: a set of bits; the kernel writes to it.
    unsafe {
        let mut cores: libc::cpu_set_t = std::mem::zeroed();
        libc::sched_getaffinity(pid, size_of_val(&cores), &raw mut cores);
        cores
    }
}

fn run_on(pid: i32, cores: &libc::cpu_set_t) {
    // SAFETY: the set is only read. A machine that refuses is slower, that is all.
    unsafe { libc::sched_setaffinity(pid, size_of_val(cores), cores) };
}

/// The last of some cores.
fn one_of(cores: &libc::cpu_set_t) -> libc::cpu_set_t {
    // SAFETY: a set of bits, all of it numbers.
    unsafe {
        let mut one: libc::cpu_set_t = std::mem::zeroed();
        let bits = 0..8 * size_of_val(cores);
        if let Some(core) = bits.rev().find(|core| libc::CPU_ISSET(*core, cores)) {
            libc::CPU_SET(core, &mut one);
        }
        one
    }
}

fn signal(pid: i32, signal: i32) {
    // SAFETY: a process that is traced, or whose number was just read, by the caller.
    unsafe { libc::kill(pid, signal) };
}

/// A process of this name below another one.
fn descendant(of: u32, name: &str) -> Option<u32> {
    children(of).into_iter().find_map(|pid| match stat(pid) {
        Some(stat) if stat.name == name => Some(pid),
        _ => descendant(pid, name),
    })
}

/// Whether a process was started as this worker.
fn is_worker(pid: i32, worker: usize) -> bool {
    let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
    let wanted = format!("TESTUDO_WORKER={worker}:");
    environment.split(|byte| *byte == 0).any(|entry| entry.starts_with(wanted.as_bytes()))
}

/// The program and the libraries of a process, the program first.
fn modules(pid: i32) -> Vec<Module> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).expect("a process");
    let program = std::fs::read_link(format!("/proc/{pid}/exe")).expect("a process");
    let mut found: Vec<(bool, String, Module)> = Vec::new();
    let mut base = (String::new(), 0);
    for line in maps.lines() {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let Some(name) = fields.get(5).filter(|name| name.starts_with('/')) else { continue };
        let (from, to) = fields[0].split_once('-').expect("a range");
        let number = |text| u64::from_str_radix(text, 16).expect("an address");
        let code = number(from)..number(to);
        // The parts of a file follow one another.
        if base.0 != *name {
            base = ((*name).to_owned(), code.start);
        }
        if fields[1].contains('x') {
            let is_library = std::path::Path::new(name) != program;
            found.push((is_library, base.0.clone(), Module { base: base.1, code }));
        }
    }
    found.sort_by(|one, other| (one.0, &one.1).cmp(&(other.0, &other.1)));
    found.into_iter().map(|(_, _, module)| module).collect()
}
