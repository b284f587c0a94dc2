//! Cells: named places in a worker's segment for everything that must survive it: positions,
//! offsets, watermarks, counters, cursors. Private truth: what peers read is published from them
//! after commit.
//!
//! The directory is found by name, so a successor (or a new binary) finds its cells whatever order
//! it asks in. A process looks names up in a map of its own, filled from the directory: attaching
//! to thousands of cells reads each entry once.
//!
//! Invariants:
//! - the directory's layout is version-stable (R22) and only grows; an entry is complete before the
//!   count includes it, and all of it goes through the transaction;
//! - a cell keeps the size that it was created with; asking with another size is an error, not a
//!   reinterpretation;
//! - what a dead process left is checked before it is used: a directory that cannot be true, or
//!   whose entries are not those that were made, is an error, never a panic.
//!
//! Called while attaching; afterwards a cell is just a [`Place`].

use crate::txn::{Place, Plain, Txn};
use std::cell::RefCell;
use std::collections::HashMap;
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// First word of a directory.
pub const MAGIC: u64 = 0x7465_7374_6365_6c31;
/// Cells that a directory can name.
pub const ENTRIES: u64 = 16_384;

/// Bytes of the directory's head and entries, before the first cell.
pub const DIRECTORY: u64 = 64 + ENTRIES * size_of::<Entry>() as u64;

#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Entry {
    name: u64,
    offset: u32,
    bytes: u32,
}

#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct DirectoryHead {
    magic: u64,
    count: u32,
    used: u32,
    /// Of all entries, in whatever order they are looked at.
    checksum: u64,
}

const _: () = assert!(size_of::<Entry>() == 16 && size_of::<DirectoryHead>() == 24);

impl Entry {
    /// What it adds to the directory's checksum.
    fn share(self) -> u64 {
        crate::hash::key_hash(self.as_bytes())
    }
}

/// Why a cell could not be opened.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum CellError {
    /// The area or the directory is full.
    Full {
        /// The cell asked for.
        name: String,
        /// Bytes of the area.
        bytes: u64,
    },
    /// The cell exists with another size.
    Size {
        /// The cell asked for.
        name: String,
        /// Bytes that it has.
        found: u32,
        /// Bytes asked for.
        wanted: u32,
    },
    /// The area holds something else.
    Damaged,
}

impl std::fmt::Display for CellError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Full { name, bytes } => {
                write!(f, "no room for cell {name}: an area has {bytes} bytes and {ENTRIES} cells")
            }
            Self::Size { name, found, wanted } => {
                write!(f, "cell {name} has {found} bytes, this program wants {wanted}")
            }
            Self::Damaged => write!(f, "the cell directory is damaged"),
        }
    }
}

impl std::error::Error for CellError {}

/// The directory of one worker's cells.
#[derive(Debug)]
pub struct Cells {
    at: u64,
    len: u64,
    index: RefCell<Index>,
}

/// Where names stand in the directory, as far as it was read.
#[derive(Debug, Default)]
struct Index {
    entries: HashMap<u64, u32>,
    read: u32,
}

impl Cells {
    /// Opens the directory at arena offset `at`, making an empty one in zeroed memory.
    ///
    /// # Errors
    /// [`CellError::Damaged`] when something else is there.
    pub fn open(txn: &mut Txn, at: u64, len: u64) -> Result<Self, CellError> {
        let cells = Self { at, len, index: RefCell::default() };
        let head = txn.get(cells.head(txn));
        match head.magic {
            MAGIC if cells.is_sound(head) && cells.verify(txn, head) => Ok(cells),
            0 => {
                let used = DIRECTORY as u32;
                let head = DirectoryHead { magic: MAGIC, count: 0, used, checksum: 0 };
                txn.set(cells.head(txn), head);
                Ok(cells)
            }
            _ => Err(CellError::Damaged),
        }
    }

    /// Whether there is no directory at arena offset `at` yet.
    #[must_use]
    pub fn is_unmade(txn: &Txn, at: u64) -> bool {
        let head: DirectoryHead = txn.get(txn.place(at));
        head.as_bytes().iter().all(|byte| *byte == 0)
    }

    fn is_sound(&self, head: DirectoryHead) -> bool {
        let used = u64::from(head.used);
        // An area with no room for cells has a directory all the same.
        let fits = used == DIRECTORY || (used > DIRECTORY && used <= self.len);
        fits && used.is_multiple_of(8) && u64::from(head.count) <= ENTRIES
    }

    /// Whether the entries are those that were made: one cell behind the other, and the checksum.
    fn verify(&self, txn: &Txn, head: DirectoryHead) -> bool {
        let (mut end, mut checksum) = (DIRECTORY, 0);
        for index in 0..head.count {
            let entry = txn.get(self.entry(txn, index));
            if u64::from(entry.offset) != end {
                return false;
            }
            end += u64::from(entry.bytes).next_multiple_of(8);
            checksum ^= entry.share();
        }
        (end, checksum) == (u64::from(head.used), head.checksum)
    }

    /// Whether an entry's cell lies behind the directory and within what is in use.
    fn holds(head: DirectoryHead, entry: Entry) -> bool {
        let end = u64::from(entry.offset) + u64::from(entry.bytes);
        let begins = u64::from(entry.offset) >= DIRECTORY && entry.offset.is_multiple_of(8);
        begins && end <= u64::from(head.used)
    }

    /// All cells, as the hashes of their names and their bytes: for a cut.
    ///
    /// # Errors
    /// When the directory is damaged.
    pub fn export(&self, txn: &Txn) -> Result<Vec<(u64, Vec<u8>)>, CellError> {
        let head = txn.get(self.head(txn));
        if head.magic != MAGIC || !self.is_sound(head) {
            return Err(CellError::Damaged);
        }
        let cells = (0..head.count).map(|index| {
            let entry = txn.get(self.entry(txn, index));
            if !Self::holds(head, entry) {
                return Err(CellError::Damaged);
            }
            let from = self.at + u64::from(entry.offset);
            let bytes =
                (0..u64::from(entry.bytes)).map(|byte| txn.get(txn.place::<u8>(from + byte)));
            Ok((entry.name, bytes.collect()))
        });
        cells.collect()
    }

    /// Makes a cell that another worker had, with what was in it, unless there is one of that name.
    ///
    /// # Errors
    /// As [`Cells::cell`].
    pub fn import(&self, txn: &mut Txn, name: u64, bytes: &[u8]) -> Result<(), CellError> {
        let head = txn.get(self.head(txn));
        if !self.is_sound(head) {
            return Err(CellError::Damaged);
        }
        if self.find(txn, head.count, name).is_some() {
            return Ok(());
        }
        let Some(offset) = self.append(txn, head, name, bytes.len()) else {
            return Err(CellError::Full { name: format!("{name:#x}"), bytes: self.len });
        };
        for (byte, value) in (offset..).zip(bytes) {
            txn.set(txn.place::<u8>(byte), *value);
        }
        Ok(())
    }

    /// Adds an entry for a cell of so many bytes: the arena offset of its place.
    fn append(&self, txn: &mut Txn, head: DirectoryHead, name: u64, bytes: usize) -> Option<u64> {
        let used = u64::from(head.used) + bytes.next_multiple_of(8) as u64;
        if used > self.len || u64::from(head.count) == ENTRIES {
            return None;
        }
        let entry = Entry { name, offset: head.used, bytes: bytes as u32 };
        txn.set(self.entry(txn, head.count), entry);
        let checksum = head.checksum ^ entry.share();
        let grown = DirectoryHead { count: head.count + 1, used: used as u32, checksum, ..head };
        txn.set(self.head(txn), grown);
        Some(self.at + u64::from(head.used))
    }

    fn head(&self, txn: &Txn) -> Place<DirectoryHead> {
        txn.place(self.at)
    }

    fn entry(&self, txn: &Txn, index: u32) -> Place<Entry> {
        txn.place(self.at + 64 + u64::from(index) * size_of::<Entry>() as u64)
    }

    /// The entry of a name among the first `count`. What the directory gained since the last look
    /// is read first; if it lost something (a rollback), all of it is.
    fn find(&self, txn: &Txn, count: u32, name: u64) -> Option<Entry> {
        let mut index = self.index.borrow_mut();
        if index.read > count {
            *index = Index::default();
        }
        for at in index.read..count {
            index.entries.entry(txn.get(self.entry(txn, at)).name).or_insert(at);
        }
        index.read = count;
        index.entries.get(&name).map(|at| txn.get(self.entry(txn, *at)))
    }

    /// Finds the cell called `name`, or creates it with `initial`.
    ///
    /// # Errors
    /// When it has another size, there is no room, or the directory is damaged.
    pub fn cell<T: Plain>(
        &self,
        txn: &mut Txn,
        name: &str,
        initial: T,
    ) -> Result<Place<T>, CellError> {
        let hash = crate::hash::name_hash(name);
        let bytes = size_of::<T>() as u32;
        let head = txn.get(self.head(txn));
        if !self.is_sound(head) {
            return Err(CellError::Damaged);
        }
        if let Some(entry) = self.find(txn, head.count, hash) {
            if entry.bytes != bytes {
                let (name, found) = (name.into(), entry.bytes);
                return Err(CellError::Size { name, found, wanted: bytes });
            }
            if !Self::holds(head, entry) {
                return Err(CellError::Damaged);
            }
            return Ok(txn.place(self.at + u64::from(entry.offset)));
        }
        let Some(offset) = self.append(txn, head, hash, bytes as usize) else {
            return Err(CellError::Full { name: name.into(), bytes: self.len });
        };
        let place = txn.place(offset);
        txn.set(place, initial);
        Ok(place)
    }
}
