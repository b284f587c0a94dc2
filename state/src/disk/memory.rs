//! A model of a disk that is as unkind as POSIX allows: what is not synced may be lost in a crash,
//! piece by piece.
//!
//! The model. A write that no sync covers is on the disk after a crash or not, each 512-byte sector
//! for itself, whatever was written before or after it. Its file may have grown without it (zeros).
//! A name that was made, moved or removed and not synced with its folder may be so or not, each for
//! itself; a move happens whole. A sync that failed loses what it was for: later reads still see
//! it, and no later sync makes it durable. Operations in flight may have begun.
//!
//! Invariants: what two runs with the same operations and the same choice leave is the same.
//! Folders are always there.
//!
//! Called by tests of everything that writes checkpoints.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use super::{Buffer, DEPTH_MAX, Disk, Done, FileId, Op, Outcome, Ticket, failure};

/// What a disk writes whole or not at all.
pub const SECTOR: usize = 512;

/// What a crash leaves of all that it may leave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// Bit `n` says whether the `n`-th unknown is kept; the last bit speaks for all above. A write
    /// is two unknowns: it can be torn at one place.
    Bits(u64),
    /// Chance decides, for each sector.
    Seed(u64),
}

/// Small, reproducible chance (splitmix64).
#[derive(Debug, Clone)]
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }
}

/// Decides one unknown after the other.
struct Coin {
    choice: Choice,
    random: Random,
    asked: u32,
}

impl Coin {
    fn new(choice: Choice) -> Self {
        let seed = if let Choice::Seed(seed) = choice { seed } else { 0 };
        Self { choice, random: Random(seed), asked: 0 }
    }

    fn keeps(&mut self) -> bool {
        let place = self.asked.min(63);
        self.asked += 1;
        match self.choice {
            Choice::Bits(bits) => (bits >> place) & 1 == 1,
            // Of every four seeds two keep half, one most and one little.
            Choice::Seed(seed) => self.random.next() % 16 < [8, 15, 8, 1][(seed % 4) as usize],
        }
    }

    /// Where a write of so many bytes can be torn: the ends of its pieces.
    fn pieces(&self, bytes: usize) -> Vec<usize> {
        match self.choice {
            Choice::Seed(_) => (SECTOR..bytes).step_by(SECTOR).chain([bytes]).collect(),
            // One sector behind the middle: inside a block, and never at its half.
            Choice::Bits(_) => {
                let torn = (bytes / super::BLOCK / 2) * super::BLOCK + SECTOR;
                [torn, bytes].into_iter().filter(|end| *end <= bytes).collect()
            }
        }
    }
}

/// The bytes of a file, whatever its names.
#[derive(Debug, Clone, Default)]
struct Node {
    /// What a read gives.
    now: Vec<u8>,
    /// What a crash leaves at least.
    durable: Vec<u8>,
    /// What a crash may leave: position and bytes, oldest first.
    writes: Vec<(usize, Vec<u8>)>,
}

fn put_at(content: &mut Vec<u8>, at: usize, bytes: &[u8]) {
    let end = at + bytes.len();
    content.resize(content.len().max(end), 0);
    content[at..end].copy_from_slice(bytes);
}

impl Node {
    fn write(&mut self, at: usize, bytes: &[u8]) {
        put_at(&mut self.now, at, bytes);
        self.writes.push((at, bytes.to_vec()));
    }

    fn sync(&mut self) {
        for (at, bytes) in self.writes.drain(..) {
            put_at(&mut self.durable, at, &bytes);
        }
    }

    fn after_crash(&self, coin: &mut Coin) -> Self {
        let mut left = self.durable.clone();
        for (at, bytes) in &self.writes {
            let mut start = 0;
            for end in coin.pieces(bytes.len()) {
                if coin.keeps() {
                    put_at(&mut left, at + start, &bytes[start..end]);
                }
                start = end;
            }
        }
        let grown = self.writes.iter().map(|(at, bytes)| at + bytes.len()).max().unwrap_or(0);
        if grown > left.len() && coin.keeps() {
            left.resize(grown, 0);
        }
        Self { now: left.clone(), durable: left, writes: Vec::new() }
    }
}

/// A change of a folder.
#[derive(Debug, Clone)]
enum Naming {
    Add(PathBuf, usize),
    Move(PathBuf, PathBuf, usize),
    Remove(PathBuf),
}

impl Naming {
    fn apply(&self, names: &mut BTreeMap<PathBuf, usize>) {
        match self {
            Naming::Add(path, node) => {
                names.insert(path.clone(), *node);
            }
            Naming::Move(from, to, node) => {
                names.remove(from);
                names.insert(to.clone(), *node);
            }
            Naming::Remove(path) => {
                names.remove(path);
            }
        }
    }

    fn is_in(&self, folder: &Path) -> bool {
        let (Naming::Add(path, _) | Naming::Move(_, path, _) | Naming::Remove(path)) = self;
        path.parent() == Some(folder)
    }

    fn node(&self) -> Option<usize> {
        match self {
            Naming::Add(_, node) | Naming::Move(_, _, node) => Some(*node),
            Naming::Remove(_) => None,
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct OpenFile {
    node: usize,
    reads: bool,
    writes: bool,
}

#[derive(Debug, Default)]
struct Inner {
    nodes: Vec<Node>,
    names: BTreeMap<PathBuf, usize>,
    durable_names: BTreeMap<PathBuf, usize>,
    /// Unsynced, oldest first.
    namings: Vec<Naming>,
    open: BTreeMap<u64, OpenFile>,
    next_file: u64,
    pending: Vec<(Ticket, Op)>,
    submitted: u64,
    executed: u64,
    /// The operation before which the machine goes off.
    stop_before: Option<u64>,
    failing_syncs: u32,
    /// Completes in any order when set.
    order: Option<Random>,
}

/// A disk in memory. Clones are the same disk.
#[derive(Debug, Clone, Default)]
pub struct Memory {
    inner: Rc<RefCell<Inner>>,
}

impl Memory {
    /// An empty disk.
    pub fn new() -> Self {
        Self::default()
    }

    /// From here on operations in flight complete in an order by chance, some later than others.
    pub fn shuffle(&self, seed: u64) {
        self.inner.borrow_mut().order = Some(Random(seed));
    }

    /// Operations carried out so far, on this disk and those it came from by crashes.
    pub fn operations(&self) -> u64 {
        self.inner.borrow().executed
    }

    /// The machine goes off before its `n`-th operation (from 0, counted as
    /// [`Memory::operations`]): this and all later ones fail and change nothing.
    pub fn stop_before(&self, n: u64) {
        self.inner.borrow_mut().stop_before = Some(n);
    }

    /// The next so many syncs of files fail with EIO, and what they were for is never durable.
    pub fn fail_syncs(&self, count: u32) {
        self.inner.borrow_mut().failing_syncs = count;
    }

    /// The disk as a crash at this moment leaves it: a disk of its own, on which nothing is open.
    pub fn crash(&self, choice: Choice) -> Memory {
        let mut coin = Coin::new(choice);
        Memory { inner: Rc::new(RefCell::new(self.inner.borrow().after_crash(&mut coin))) }
    }

    /// How many things a crash at this moment decides, counted as [`Choice::Bits`] does.
    pub fn unknowns(&self) -> u32 {
        let mut coin = Coin::new(Choice::Bits(0));
        self.inner.borrow().after_crash(&mut coin);
        coin.asked
    }

    /// Choices for a crash at this moment, at most `most`: all that [`Choice::Bits`] can say when
    /// they are so few, else nothing and everything kept, one kept, one lost, and seeds.
    pub fn choices(&self, most: usize) -> Vec<Choice> {
        let unknowns = self.unknowns().min(64);
        if let Some(all) = 1_u64.checked_shl(unknowns).filter(|all| *all <= most as u64) {
            return (0..all).map(Choice::Bits).collect();
        }
        let single = (0..unknowns).flat_map(|n| [Choice::Bits(1 << n), Choice::Bits(!(1 << n))]);
        let ends = [Choice::Bits(0), Choice::Bits(u64::MAX)];
        ends.into_iter().chain(single).chain((0..).map(Choice::Seed)).take(most).collect()
    }

    /// What a file holds now.
    pub fn content(&self, path: &Path) -> Option<Vec<u8>> {
        let inner = self.inner.borrow();
        inner.names.get(path).map(|node| inner.nodes[*node].now.clone())
    }

    /// All names.
    pub fn names(&self) -> Vec<PathBuf> {
        self.inner.borrow().names.keys().cloned().collect()
    }

    /// Puts a durable file there, in place of one that had the name: for tests of damage.
    pub fn put(&self, path: &Path, content: &[u8]) {
        let inner = &mut *self.inner.borrow_mut();
        let (now, durable) = (content.to_vec(), content.to_vec());
        inner.nodes.push(Node { now, durable, writes: Vec::new() });
        for names in [&mut inner.names, &mut inner.durable_names] {
            names.insert(path.to_owned(), inner.nodes.len() - 1);
        }
    }
}

fn os_error(code: i32) -> io::Error {
    io::Error::from_raw_os_error(code)
}

impl Inner {
    fn after_crash(&self, coin: &mut Coin) -> Inner {
        let mut left = Inner {
            nodes: self.nodes.clone(),
            durable_names: self.durable_names.clone(),
            namings: self.namings.clone(),
            names: self.names.clone(),
            next_file: self.next_file,
            executed: self.executed,
            open: self.open.clone(),
            ..Inner::default()
        };
        // What is in flight may have begun: as done and not synced, each part is kept or not. What
        // was asked of a machine that was off has not.
        let is_on = !self.is_off();
        for (_, op) in self.pending.iter().filter(|_| is_on) {
            left.begin(op);
        }
        let named = left.durable_names.values().copied();
        let reachable: Vec<usize> =
            named.chain(left.namings.iter().filter_map(Naming::node)).collect();
        for (number, node) in left.nodes.iter_mut().enumerate() {
            let is_reachable = reachable.contains(&number);
            *node = if is_reachable { node.after_crash(coin) } else { Node::default() };
        }
        for naming in std::mem::take(&mut left.namings) {
            if coin.keeps() {
                naming.apply(&mut left.durable_names);
            }
        }
        left.open.clear();
        left.names = left.durable_names.clone();
        left
    }

    fn is_off(&self) -> bool {
        self.stop_before.is_some_and(|n| self.executed >= n)
    }

    /// The effect of an operation that may have been carried out; errors of it change nothing.
    fn begin(&mut self, op: &Op) {
        match op {
            Op::Write { file, at, buffer, bytes } => {
                let node = self.file(*file).node;
                self.nodes[node].write(*at as usize, &buffer[..*bytes]);
            }
            Op::Reserve { file, bytes } => {
                let node = self.file(*file).node;
                self.nodes[node].write(*bytes as usize, &[]);
            }
            Op::Create { path } => drop(self.create(path)),
            Op::Rename { from, to } => drop(self.rename(from, to)),
            Op::Remove { path } => drop(self.remove(path)),
            _ => {}
        }
    }

    fn file(&self, file: FileId) -> OpenFile {
        let open = self.open.get(&file.0);
        *open.unwrap_or_else(|| panic!("{file:?} is not open on this disk"))
    }

    fn opened(&mut self, node: usize, reads: bool, writes: bool) -> Outcome {
        self.next_file += 1;
        self.open.insert(self.next_file, OpenFile { node, reads, writes });
        Outcome::File(FileId(self.next_file))
    }

    fn rename_all(&mut self, naming: Naming) {
        naming.apply(&mut self.names);
        self.namings.push(naming);
    }

    fn create(&mut self, path: &Path) -> io::Result<Outcome> {
        if self.names.contains_key(path) {
            return Err(os_error(libc::EEXIST));
        }
        self.nodes.push(Node::default());
        let node = self.nodes.len() - 1;
        self.rename_all(Naming::Add(path.to_owned(), node));
        Ok(self.opened(node, false, true))
    }

    fn rename(&mut self, from: &Path, to: &Path) -> io::Result<Outcome> {
        let node = self.node_at(from)?;
        self.rename_all(Naming::Move(from.to_owned(), to.to_owned(), node));
        Ok(Outcome::Done)
    }

    fn remove(&mut self, path: &Path) -> io::Result<Outcome> {
        self.node_at(path)?;
        self.rename_all(Naming::Remove(path.to_owned()));
        Ok(Outcome::Done)
    }

    fn node_at(&self, path: &Path) -> io::Result<usize> {
        self.names.get(path).copied().ok_or_else(|| os_error(libc::ENOENT))
    }

    fn sync(&mut self, file: FileId) -> io::Result<Outcome> {
        let node = self.file(file).node;
        if self.failing_syncs > 0 {
            self.failing_syncs -= 1;
            // Pages are marked clean all the same: nobody will write them again.
            self.nodes[node].writes.clear();
            return Err(os_error(libc::EIO));
        }
        self.nodes[node].sync();
        Ok(Outcome::Done)
    }

    fn sync_folder(&mut self, folder: &Path) -> Outcome {
        let (synced, rest): (Vec<_>, Vec<_>) =
            self.namings.drain(..).partition(|naming| naming.is_in(folder));
        self.namings = rest;
        for naming in synced {
            naming.apply(&mut self.durable_names);
        }
        Outcome::Done
    }

    fn read(&self, file: FileId, at: u64, into: &mut [u8]) -> io::Result<Outcome> {
        let open = self.file(file);
        if !open.reads {
            return Err(os_error(libc::EBADF));
        }
        let content = &self.nodes[open.node].now;
        let from = content.len().min(at as usize);
        let length = into.len().min(content.len() - from);
        into[..length].copy_from_slice(&content[from..from + length]);
        Ok(Outcome::Read(length))
    }

    fn write(&mut self, file: FileId, at: u64, bytes: &[u8]) -> io::Result<Outcome> {
        let open = self.file(file);
        if !open.writes {
            return Err(os_error(libc::EBADF));
        }
        self.nodes[open.node].write(at as usize, bytes);
        Ok(Outcome::Done)
    }

    fn execute(&mut self, op: &mut Op) -> io::Result<Outcome> {
        if self.is_off() {
            let off = "the machine is off: the model's stop was reached";
            return Err(io::Error::other(off));
        }
        self.executed += 1;
        match op {
            Op::Create { path } => self.create(path).map_err(|e| failure("create", path, e)),
            Op::Open { path } | Op::Edit { path } => {
                let node = self.node_at(path).map_err(|e| failure("open", path, e))?;
                let edits = matches!(op, Op::Edit { .. });
                Ok(self.opened(node, true, edits))
            }
            // Grows to there, where it is shorter.
            Op::Reserve { file, bytes } => self.write(*file, *bytes, &[]),
            Op::Write { file, at, buffer, bytes } => self.write(*file, *at, &buffer[..*bytes]),
            Op::Read { file, at, buffer, bytes } => self.read(*file, *at, &mut buffer[..*bytes]),
            Op::Sync { file } => self.sync(*file),
            // Not a file of this model: the kernel's own.
            Op::SyncFd { fd } => {
                std::fs::File::from(fd.try_clone()?).sync_all().map(|()| Outcome::Done)
            }
            Op::Close { file } => {
                self.file(*file);
                self.open.remove(&file.0);
                Ok(Outcome::Done)
            }
            Op::Rename { from, to } => {
                self.rename(from, to).map_err(|e| failure("rename", from, e))
            }
            Op::SyncDir { path } => Ok(self.sync_folder(path)),
            Op::Remove { path } => self.remove(path).map_err(|e| failure("remove", path, e)),
        }
    }

    /// The caller's rules that the other disks check as well.
    fn check(&self, op: &Op) {
        op.check();
        let (Op::Sync { file } | Op::Close { file }) = op else { return };
        let busy = self.pending.iter().any(|(_, other)| other.transfers(*file));
        assert!(!busy, "{} while transfers of {file:?} are in flight", op.doing());
    }

    /// Which pending operation completes next.
    fn next(&mut self) -> Option<(Ticket, Op)> {
        let count = self.pending.len();
        let place = match &mut self.order {
            _ if count == 0 => return None,
            None => 0,
            Some(random) => {
                let drawn = random.next() as usize;
                // Now and then the others take until a later poll.
                if drawn.is_multiple_of(5) {
                    return None;
                }
                (drawn / 5) % count
            }
        };
        Some(self.pending.remove(place))
    }
}

impl Disk for Memory {
    fn submit(&mut self, op: Op) -> Result<Ticket, Op> {
        let inner = &mut *self.inner.borrow_mut();
        inner.check(&op);
        if inner.pending.len() >= DEPTH_MAX {
            return Err(op);
        }
        inner.submitted += 1;
        let ticket = Ticket(inner.submitted);
        inner.pending.push((ticket, op));
        Ok(ticket)
    }

    fn poll(&mut self, done: &mut Vec<Done>) {
        let inner = &mut *self.inner.borrow_mut();
        while let Some((ticket, mut op)) = inner.next() {
            let result = inner.execute(&mut op);
            let buffer: Option<Buffer> = op.into_buffer();
            done.push(Done { ticket, result, buffer });
        }
    }

    fn wait(&mut self, _patience: Duration) {}

    fn in_flight(&self) -> usize {
        self.inner.borrow().pending.len()
    }

    fn list(&self, folder: &Path) -> io::Result<Vec<(String, u64)>> {
        let inner = self.inner.borrow();
        let inside = inner.names.iter().filter(|(path, _)| path.parent() == Some(folder));
        let listed = inside.map(|(path, node)| {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            (name, inner.nodes[*node].now.len() as u64)
        });
        Ok(listed.collect())
    }

    fn kind(&self) -> &'static str {
        "memory"
    }
}
