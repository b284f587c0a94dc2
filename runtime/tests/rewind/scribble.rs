//! Wild stores: into a worker's own memory, from its user code or from the test that started it,
//! through /proc/PID/mem.

use std::cell::Cell;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

thread_local! {
    static OWED: Cell<u64> = const { Cell::new(0) };
}

/// Holds a record up. Sleeps are at least a millisecond, so they are owed until then.
pub fn hold_up(pace: u64) {
    let owed = OWED.get() + pace;
    if owed < 1_000_000 {
        OWED.set(owed);
    } else {
        OWED.set(0);
        std::thread::sleep(Duration::from_nanos(owed));
    }
}

/// Whether this process is that worker.
pub fn is_worker(number: u32) -> bool {
    let comm = std::fs::read_to_string("/proc/self/comm").unwrap_or_default();
    comm.trim() == format!("testudo-w{number}")
}

/// True for the first `times` processes that ask, in all lives of a job.
pub fn is_among_first(times: u32, folder: &Path) -> bool {
    (0..times).any(|time| {
        let flag = folder.join(format!("wounded-{time}"));
        OpenOptions::new().write(true).create_new(true).open(flag).is_ok()
    })
}

/// How many processes were among the first.
pub fn wounded(folder: &Path) -> usize {
    (0..).take_while(|time| folder.join(format!("wounded-{time}")).exists()).count()
}

/// A process's memory, as far as it may write it.
pub struct Memory {
    file: File,
    mappings: Vec<Mapping>,
}

/// Address, bytes, and the name of the segment.
struct Mapping {
    at: u64,
    bytes: u64,
    name: String,
}

const CELLS: u64 = 0x7465_7374_6365_6c31;

impl Memory {
    pub fn of(pid: u32) -> Self {
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).expect("its maps");
        let file = OpenOptions::new().read(true).write(true).open(format!("/proc/{pid}/mem"));
        let lines = maps.lines().filter(|line| line.contains(" rw-s ") && line.contains("/memfd:"));
        let mapping = |line: &str| {
            let (range, rest) = line.split_once(' ').expect("a range");
            let (from, to) = range.split_once('-').expect("two ends");
            let hex = |text| u64::from_str_radix(text, 16).expect("an address");
            let offset = rest.split_whitespace().nth(1).map(hex).expect("an offset");
            let name = rest.rsplit_once("/memfd:").map(|(_, name)| name.replace(" (deleted)", ""));
            let (at, name) = (hex(from), name.expect("a name"));
            (offset == 0).then_some(Mapping { at, bytes: hex(to) - at, name })
        };
        Self { file: file.expect("its memory"), mappings: lines.filter_map(mapping).collect() }
    }

    fn read(&self, at: u64) -> u64 {
        let mut word = [0; 8];
        self.file.read_exact_at(&mut word, at).expect("a mapped word");
        u64::from_le_bytes(word)
    }

    fn write(&self, at: u64, word: u64) {
        self.file.write_all_at(&word.to_le_bytes(), at).expect("a writable word");
    }

    /// Its worker segment.
    fn segment(&self) -> u64 {
        let is_segment = |mapping: &&Mapping| {
            let number = mapping.name.rsplit("-w").next().map(str::parse::<u32>);
            number.is_some_and(|number| number.is_ok())
        };
        self.mappings.iter().find(is_segment).expect("its own segment").at
    }

    fn cells(&self) -> u64 {
        let segment = self.segment();
        let mut pages = (segment..segment + (64 << 20)).step_by(4096);
        pages.find(|at| self.read(*at) == CELLS).expect("its cells")
    }

    /// The first key group of an operator that something is in.
    fn group(&self, uid: &str) -> u64 {
        let ending = format!("-{uid}");
        let mut groups = self.mappings.iter().filter(|mapping| mapping.name.ends_with(&ending));
        let group = groups.find(|group| group.bytes > 0 && self.read(group.at + 896) != 0);
        group.expect("a key group").at
    }

    /// The slots of the table that an operator's first named state is: address and bytes.
    fn slots(&self, uid: &str) -> (u64, u64) {
        let group = self.group(uid);
        let header = group + self.read(group + 896 + 16);
        let (slots, capacity) = (self.read(header), self.read(header + 8));
        (group + slots, capacity * 16)
    }

    /// Flips a random bit in a part of what it has: where, from the part's begin, and which.
    pub fn flip(&self, part: &str, uid: &str, random: &mut super::common::Random) -> (u64, u32) {
        let (segment, cells) = (self.segment(), self.cells());
        let counted = self.read(cells + 8) & 0xFFFF_FFFF;
        // Published words stand 128 bytes apart at the end of the front.
        let words = (segment + 8192..cells).step_by(128).filter(|at| self.read(*at) > 4096);
        let (from, bytes) = match part {
            "header" => (segment, 2816),
            "published" => (words.last().expect("a position"), 8),
            "directory" => (cells, 64 + 16 * counted),
            "log" => (cells + (1 << 20), 8),
            "group" => (self.group(uid), 1024),
            "table" => {
                let group = self.group(uid);
                (group + self.read(group + 896 + 16), 64)
            }
            other => panic!("no part {other}"),
        };
        let (at, bit) = (random.below(bytes), random.below(8) as u32);
        let mut byte = [0];
        self.file.read_exact_at(&mut byte, from + at).expect("a mapped byte");
        self.file.write_all_at(&[byte[0] ^ (1 << bit)], from + at).expect("a writable byte");
        (at, bit)
    }

    /// Does what is asked for.
    pub fn wound(&self, what: &str, uid: &str) {
        let (segment, cells) = (self.segment(), self.cells());
        let log = cells + (1 << 20);
        match what {
            "log-length" => self.write(log, 12345),
            "log-entry" => {
                self.write(log + 64 + 8, 0xFFFF_FFFF_0000_0008);
                // The length with its seal: only the entry is wrong.
                self.write(log, 0x9E37_79B9_0000_0001_u64.wrapping_mul(16));
            }
            "cell-count" => self.write(cells + 8, 1 << 40),
            "cell-name" => self.write(cells + 64 + 5 * 16, 77),
            "header" => self.write(segment + 8, 0),
            "claim" => self.write(segment + 768, 0x3FFF_FFF0),
            "tail" => {
                // Published words stand 128 bytes apart at the end of the front.
                let words = (segment + 8192..cells).step_by(128);
                let tail = words.filter(|at| self.read(*at) > 4096).last().expect("a position");
                self.write(tail, u64::MAX / 2);
            }
            "group-magic" => self.write(self.group(uid), 0x1234),
            "group-empty" => self.write(self.group(uid), 0),
            "group-heap" => self.write(self.group(uid) + 32, u64::MAX),
            // The first root's first word: where its table's header lies.
            "root" => self.write(self.group(uid) + 896 + 16, 0),
            // Where the slots lie.
            "table" => {
                let group = self.group(uid);
                self.write(group + self.read(group + 896 + 16), 0x1001);
            }
            // A key where no lookup comes.
            "slot" => {
                let (slots, bytes) = self.slots(uid);
                let mut places = (slots..slots + bytes).step_by(16);
                let filled = places.find(|at| self.read(*at) != 0).expect("a key");
                self.write(filled, 0x0BAD_0BAD_0BAD_0BAD);
            }
            other => panic!("no wound {other}"),
        }
    }
}

/// Does what is asked for to this process's own memory, and dies of it.
pub fn wound(what: &str, uid: &str) -> ! {
    Memory::of(std::process::id()).wound(what, uid);
    std::process::abort();
}
