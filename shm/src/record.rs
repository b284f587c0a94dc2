//! Records: what travels in rings and lives in state. Two encodings behind one trait.
//!
//! - *plain*: a fixed-size value for which any bit pattern is valid and which has no padding
//!   (zerocopy). A batch of them is a `&[T]` in the ring: no copy, no decode.
//! - *archived*: an rkyv archive (strings, lists, options, enums), written straight into the ring
//!   and read in place. In a batch each one is preceded by eight bytes: its length, then zero; it
//!   is padded to eight.
//!
//! Invariants:
//! - the bytes of an archived value depend on the value alone (one writer, fresh position, zeroed
//!   padding), so equal keys have equal bytes;
//! - `take` and `view` never read outside the bytes they are given and never panic, whatever those
//!   bytes are (R9).
//!
//! Closures receive `&T` (plain) or `&T::Archived`; both are `&T::View`.

pub mod archived;

pub mod plain;

use crate::fault::Fault;

/// Bytes before each archived record in a batch.
pub const PREFIX: usize = 8;

/// Alignment of every payload; no record may need more.
pub const ALIGN: usize = 8;

const _: () = assert!(
    cfg!(target_endian = "little"),
    "records are little-endian, and read in place: so must be the machine"
);

/// A value that can travel in a ring and live in state. Derived with `#[testudo::record]`;
/// integers, floats, arrays of plain records, tuples of up to eight, `bool`, `char`, `String`,
/// `Option` and `Vec` are records already.
///
/// Every record can be archived as part of another one, a plain one as it is: so `Option<T>`,
/// `Vec<T>` and tuples are records wherever their parts are, also in generic code.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a record",
    label = "cannot travel in a ring or live in state",
    note = "make it one with `#[testudo::record]`, if not plain `#[testudo::record(archived)]`",
    note = "for `usize` use `u64`, for `&str` a `String`, for a map a `Vec` of pairs"
)]
pub trait Record: archived::Archivable + Sized + 'static {
    /// What closures see: `Self` for a plain record, `Self::Archived` for an archived one.
    type View: 'static;

    /// Bytes of a plain record, `None` for an archived one.
    const SIZE: Option<usize>;

    /// A number that changes when the layout does: names, types and order of fields.
    fn schema() -> u64;

    /// Makes the readable form of an owned value: in place for a plain one, encoded into `scratch`
    /// otherwise.
    fn item<'a>(&'a self, scratch: &'a mut Scratch) -> Item<'a, Self>;

    /// Appends this value to a batch at the start of `into`: bytes used, or `None` when it does not
    /// fit.
    fn put(&self, into: &mut [u8]) -> Option<usize>;

    /// Appends an item to a batch at the start of `into`: bytes used, or `None` when it does not
    /// fit.
    fn put_item(item: Item<'_, Self>, into: &mut [u8]) -> Option<usize>;

    /// Bytes that `put_item` would use.
    fn item_len(item: Item<'_, Self>) -> usize;

    /// Takes the next record off the front of a batch's bytes.
    ///
    /// # Errors
    /// What is wrong with the bytes; `bytes` is then unspecified.
    fn take<'a>(bytes: &mut &'a [u8]) -> Result<Item<'a, Self>, Fault>;

    /// As `take`, for bytes that were validated before (and cannot have changed since).
    ///
    /// # Safety
    /// `bytes` starts with a record that `take` accepted.
    unsafe fn take_trusted<'a>(bytes: &mut &'a [u8]) -> Item<'a, Self>;

    /// The item whose encoding (without prefix) is exactly `bytes`, 8-aligned, as stored in state.
    ///
    /// # Safety
    /// `bytes` were copied from [`Item::bytes`] of this type.
    unsafe fn from_stored(bytes: &[u8]) -> Item<'_, Self>;

    /// The bytes of several plain records in a row; `None` for archived ones.
    fn bytes_of(values: &[Self]) -> Option<&[u8]>;

    /// The whole batch as a slice, where the record is plain.
    fn as_slice(bytes: &[u8]) -> Option<&[Self::View]>;

    /// An owned copy.
    fn to_owned(view: &Self::View) -> Self;
}

/// A record where it lies: its view and its bytes.
#[derive(Debug)]
pub struct Item<'a, T: Record> {
    /// What closures see.
    pub view: &'a T::View,
    bytes: &'a [u8],
}

impl<T: Record> Clone for Item<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T: Record> Copy for Item<'_, T> {}

impl<'a, T: Record> Item<'a, T> {
    /// Puts a view and the bytes that it was made from together.
    #[inline(always)]
    #[must_use]
    pub fn new(view: &'a T::View, bytes: &'a [u8]) -> Self {
        Self { view, bytes }
    }

    /// The encoding, without prefix: canonical, so equal values have equal bytes.
    #[inline(always)]
    #[must_use]
    pub fn bytes(self) -> &'a [u8] {
        self.bytes
    }
}

impl<T: Record> std::ops::Deref for Item<'_, T> {
    type Target = T::View;

    #[inline(always)]
    fn deref(&self) -> &T::View {
        self.view
    }
}

/// A reusable, 8-aligned buffer for encodings.
#[derive(Debug, Default)]
pub struct Scratch {
    words: Vec<u64>,
}

impl Scratch {
    /// At least `bytes` bytes of buffer, contents unspecified.
    pub fn buffer(&mut self, bytes: usize) -> &mut [u8] {
        let words = bytes.div_ceil(8).max(8);
        if self.words.len() < words {
            self.words.resize(words.next_power_of_two(), 0);
        }
        zerocopy::IntoBytes::as_mut_bytes(self.words.as_mut_slice())
    }

    /// The buffer as it is.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        zerocopy::IntoBytes::as_bytes(self.words.as_slice())
    }
}

/// A batch of records where it lies in a ring (or in a private buffer of the same form).
#[derive(Debug)]
pub struct Batch<'a, T: Record> {
    bytes: &'a [u8],
    count: usize,
    of: std::marker::PhantomData<fn() -> T>,
}

impl<T: Record> Clone for Batch<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T: Record> Copy for Batch<'_, T> {}

impl<'a, T: Record> Batch<'a, T> {
    /// Checks that `bytes` hold exactly `count` valid records and gives access to them.
    ///
    /// # Errors
    /// What is wrong with the bytes.
    pub fn check(bytes: &'a [u8], count: usize, at: u64) -> Result<Self, Fault> {
        if !bytes.as_ptr().addr().is_multiple_of(ALIGN) {
            return Err(Fault::Alignment { at });
        }
        if let Some(size) = T::SIZE {
            // A frame's payload is padded to eight.
            let padded = |need: &usize| need.checked_next_multiple_of(ALIGN) == Some(bytes.len());
            let need = count.checked_mul(size).filter(padded);
            let Some(need) = need else {
                return Err(Fault::Count { found: count as u64, bytes: bytes.len() as u64, at });
            };
            return Ok(Self { bytes: &bytes[..need], count, of: std::marker::PhantomData });
        }
        let mut rest = bytes;
        for _ in 0..count {
            T::take(&mut rest)?;
        }
        if !rest.is_empty() {
            return Err(Fault::Count { found: count as u64, bytes: bytes.len() as u64, at });
        }
        Ok(Self { bytes, count, of: std::marker::PhantomData })
    }

    /// A batch of plain records in ordinary memory; `None` for archived ones, or where memory is
    /// aligned for less.
    #[inline(always)]
    #[must_use]
    pub fn of_values(values: &'a [T]) -> Option<Self> {
        let bytes = T::bytes_of(values)?;
        Some(Self { bytes, count: values.len(), of: std::marker::PhantomData })
    }

    /// A batch that this process encoded itself, or checked before.
    ///
    /// # Safety
    /// `bytes` hold exactly `count` records accepted by `T::take`, 8-aligned.
    #[inline(always)]
    #[must_use]
    pub unsafe fn trusted(bytes: &'a [u8], count: usize) -> Self {
        Self { bytes, count, of: std::marker::PhantomData }
    }

    /// A batch whose archived records are not validated but only walked: each one and its root lie
    /// inside the bytes. For a job that trusts its own workers (R9's switch); contents that would
    /// not validate are then read as they are. Plain records are checked as ever: it costs nothing.
    ///
    /// # Safety
    /// The contents would validate: they were written by this program and not damaged since.
    ///
    /// # Errors
    /// What is wrong with alignment, prefixes or count.
    pub unsafe fn unvalidated(bytes: &'a [u8], count: usize, at: u64) -> Result<Self, Fault> {
        if T::SIZE.is_some() {
            return Self::check(bytes, count, at);
        }
        if !bytes.as_ptr().addr().is_multiple_of(ALIGN) {
            return Err(Fault::Alignment { at });
        }
        let mut rest = bytes;
        for _ in 0..count {
            archived::take_bytes::<T::View>(&mut rest)?;
        }
        if !rest.is_empty() {
            return Err(Fault::Count { found: count as u64, bytes: bytes.len() as u64, at });
        }
        Ok(Self { bytes, count, of: std::marker::PhantomData })
    }

    /// The first `count` records (all, if there are fewer) and the others.
    #[must_use]
    pub fn split_at(self, count: usize) -> (Self, Self) {
        let count = count.min(self.count);
        let at = match T::SIZE {
            Some(size) => count * size,
            None => {
                let mut items = self.iter();
                items.by_ref().take(count).for_each(drop);
                self.bytes.len() - items.rest().len()
            }
        };
        let (first, second) = self.bytes.split_at(at);
        let of = std::marker::PhantomData;
        (Self { bytes: first, count, of }, Self { bytes: second, count: self.count - count, of })
    }

    /// Number of records.
    #[inline(always)]
    #[must_use]
    pub fn len(self) -> usize {
        self.count
    }

    /// True when there is none.
    #[inline(always)]
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.count == 0
    }

    /// The bytes of all records, prefixes included.
    #[inline(always)]
    #[must_use]
    pub fn bytes(self) -> &'a [u8] {
        self.bytes
    }

    /// The records as a slice in place; `None` for archived ones.
    #[inline(always)]
    #[must_use]
    pub fn as_slice(self) -> Option<&'a [T::View]> {
        T::as_slice(self.bytes)
    }

    /// Each record in turn.
    #[inline(always)]
    #[must_use]
    pub fn iter(self) -> Items<'a, T> {
        Items { rest: self.bytes, left: self.count, of: std::marker::PhantomData }
    }
}

impl<'a, T: Record> IntoIterator for Batch<'a, T> {
    type Item = Item<'a, T>;
    type IntoIter = Items<'a, T>;

    #[inline(always)]
    fn into_iter(self) -> Items<'a, T> {
        self.iter()
    }
}

/// Iterator over a batch's records.
#[derive(Debug)]
pub struct Items<'a, T: Record> {
    rest: &'a [u8],
    left: usize,
    of: std::marker::PhantomData<fn() -> T>,
}

impl<'a, T: Record> Items<'a, T> {
    /// The bytes not yet taken.
    #[must_use]
    pub fn rest(&self) -> &'a [u8] {
        self.rest
    }
}

impl<'a, T: Record> Iterator for Items<'a, T> {
    type Item = Item<'a, T>;

    #[inline(always)]
    fn next(&mut self) -> Option<Item<'a, T>> {
        if self.left == 0 {
            return None;
        }
        self.left -= 1;
        // SAFETY: a Batch holds `count` records that were checked when it was made.
        Some(unsafe { T::take_trusted(&mut self.rest) })
    }
}
