//! What a dying process says of its death in numbers: the signal, the address, the return addresses
//! on its stack. Written by signal handlers, which may call nothing; text is in the last words.
//!
//! Invariants: plain stores into the process's own segment, `kind` last, so what stands behind a
//! kind is complete (R23); the process's number tells whose words they are, since a process that
//! dies before its claim leaves those of its predecessor.
//!
//! Written by the worker's handlers; read by the supervisor.

use crate::primitive::{AtomicU32, AtomicU64, Ordering};

/// Return addresses that are kept.
pub const FRAMES: usize = 48;

/// How a process ended itself.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// Nothing was said.
    #[default]
    None = 0,
    /// A signal of its own doing: a fault, or abort.
    Signal = 1,
    /// A signal that another process sent.
    Sent = 2,
    /// A panic; the last words have its message.
    Panic = 3,
    /// It called exit.
    Exit = 4,
}

/// The page's part.
#[derive(Debug)]
#[repr(C)]
pub struct Obituary {
    kind: AtomicU32,
    pid: AtomicU32,
    signal: AtomicU32,
    is_overflow: AtomicU32,
    address: AtomicU64,
    /// Where the executable lies in this process: frames are given relative to it.
    base: AtomicU64,
    count: AtomicU64,
    sender: AtomicU64,
    reserved: [AtomicU64; 10],
    frames: [AtomicU64; FRAMES],
}

// Loom's atomics have other sizes; nothing is shared with another process there.
#[cfg(not(loom))]
const _: () = assert!(size_of::<Obituary>() == 128 + 8 * FRAMES);

/// What an obituary says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Told {
    /// How.
    pub kind: Kind,
    /// The signal.
    pub signal: i32,
    /// The stack had come to its end.
    pub is_overflow: bool,
    /// The address that could not be accessed.
    pub address: u64,
    /// The process that sent the signal.
    pub sender: u32,
    /// Where the executable lay.
    pub base: u64,
    /// The instruction, then the return addresses, as they were in that process.
    pub frames: Vec<u64>,
}

impl Obituary {
    /// A new process: nothing is said yet, and the executable lies there.
    pub fn begin(&self, pid: u32, base: u64) {
        self.kind.store(0, Ordering::Relaxed);
        self.count.store(0, Ordering::Relaxed);
        self.base.store(base, Ordering::Relaxed);
        self.pid.store(pid, Ordering::Release);
    }

    /// One more frame of the stack; false when no more are kept. Async-signal-safe, as all of this.
    pub fn frame(&self, address: u64) -> bool {
        let count = self.count.load(Ordering::Relaxed) as usize;
        let Some(place) = self.frames.get(count) else { return false };
        place.store(address, Ordering::Relaxed);
        self.count.store(count as u64 + 1, Ordering::Relaxed);
        true
    }

    /// A signal came: its number, the address that it is about, who sent it (0: nobody).
    pub fn signal(&self, signal: i32, address: u64, sender: u32, is_overflow: bool) {
        self.signal.store(signal as u32, Ordering::Relaxed);
        self.address.store(address, Ordering::Relaxed);
        self.sender.store(u64::from(sender), Ordering::Relaxed);
        self.is_overflow.store(u32::from(is_overflow), Ordering::Relaxed);
        self.say(if sender == 0 { Kind::Signal } else { Kind::Sent });
    }

    /// Says how, unless something was said before: a panic aborts, too.
    pub fn say(&self, kind: Kind) {
        if self.kind.load(Ordering::Relaxed) == 0 {
            self.kind.store(kind as u32, Ordering::Release);
        }
    }

    /// What the process of this number has said.
    #[must_use]
    pub fn read(&self, pid: u32) -> Told {
        let is_its_own = self.pid.load(Ordering::Acquire) == pid;
        let kind = match self.kind.load(Ordering::Acquire) {
            1 if is_its_own => Kind::Signal,
            2 if is_its_own => Kind::Sent,
            3 if is_its_own => Kind::Panic,
            4 if is_its_own => Kind::Exit,
            _ => Kind::None,
        };
        let count = if kind == Kind::None { 0 } else { self.count.load(Ordering::Relaxed) };
        let frames = self.frames.iter().take(count as usize);
        Told {
            kind,
            signal: self.signal.load(Ordering::Relaxed) as i32,
            is_overflow: self.is_overflow.load(Ordering::Relaxed) != 0,
            address: self.address.load(Ordering::Relaxed),
            sender: self.sender.load(Ordering::Relaxed) as u32,
            base: self.base.load(Ordering::Relaxed),
            frames: frames.map(|frame| frame.load(Ordering::Relaxed)).collect(),
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn what_a_process_said_is_not_taken_for_its_successors_words() {
        // SAFETY: all fields are integers, for which zeros are a value.
        let page: Box<Obituary> = unsafe { Box::new(std::mem::zeroed()) };
        page.begin(7, 0x1000);
        page.signal(11, 0xdead, 0, true);
        (0..2 * FRAMES as u64).for_each(|frame| {
            page.frame(frame);
        });
        let told = page.read(7);
        assert_eq!((told.kind, told.signal, told.address), (Kind::Signal, 11, 0xdead));
        assert_eq!(told.frames.len(), FRAMES);
        assert_eq!(page.read(8).kind, Kind::None, "it died before its claim");
        page.begin(8, 0x1000);
        assert_eq!(page.read(8).kind, Kind::None);
    }

    #[test]
    fn the_first_word_counts() {
        // SAFETY: as above.
        let page: Box<Obituary> = unsafe { Box::new(std::mem::zeroed()) };
        page.begin(7, 0);
        page.say(Kind::Panic);
        page.signal(6, 0, 0, false);
        assert_eq!(page.read(7).kind, Kind::Panic, "the abort that follows is the panic's");
    }
}
