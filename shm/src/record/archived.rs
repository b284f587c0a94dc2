//! Archived records: the trait's methods for any rkyv type, and the types that are records already.
//!
//! Invariants:
//! - in a batch: eight bytes of length (little-endian), the rkyv bytes with the root at their end,
//!   zeros up to eight;
//! - an encoding starts at position 0 of its own buffer and every byte of it is written, padding as
//!   zero: it depends on the value alone, not on what the buffer held or where in the batch it
//!   stands;
//! - the lengths and the archive are checked before a view is made (R9). What a peer scribbles
//!   afterwards is excluded, as the rule says.
//!
//! Called by the code that `#[testudo::record(archived)]` generates. `unsafe` only where a check
//! was made before.

use super::{ALIGN, Item, PREFIX, Record, Scratch};
use crate::fault::Fault;
use rkyv::api::low::{LowDeserializer, LowSerializer, LowValidator};
use rkyv::bytecheck::CheckBytes;
use rkyv::rancor::{Failure, Panic};
use rkyv::ser::allocator::ArenaHandle;
use rkyv::ser::writer::Buffer;
use rkyv::{Archive, Deserialize, Serialize};

/// Longest encoding. Relative pointers have 32 bits and a string's length 30: below this, neither
/// can overflow.
pub const BYTES_MAX: usize = 1 << 30;

/// Writes archives into a slice; no shared pointers (`Rc` has no canonical form).
pub type Encoder<'a> = LowSerializer<Buffer<'a>, ArenaHandle<'a>, Failure>;

/// Validates archives. Its error carries nothing, since the fault says all that the reader can act
/// on.
pub type Checker<'a> = LowValidator<'a, Failure>;

/// Turns archives back into values. Cannot fail on a validated archive of the types that are
/// records.
pub type Decoder = LowDeserializer<Panic>;

/// What rkyv must offer for a type so that it can be a record, or part of an archived one.
#[diagnostic::on_unimplemented(
    message = "`{Self}` has no archived form that a record can use",
    note = "make it a record with `#[testudo::record]` or `#[testudo::record(archived)]`"
)]
pub trait Archivable:
    for<'a> Serialize<Encoder<'a>>
    + Archive<Archived: for<'a> CheckBytes<Checker<'a>> + Deserialize<Self, Decoder> + 'static>
    + Sized
    + 'static
{
}

impl<T> Archivable for T
where
    T: for<'a> Serialize<Encoder<'a>> + Sized + 'static,
    T: Archive<Archived: for<'a> CheckBytes<Checker<'a>> + Deserialize<T, Decoder> + 'static>,
{
}

/// Refuses, at compile time, what a batch cannot hold: over-aligned archives and those without a
/// byte (a list of them could claim billions of elements in no space).
pub const fn check_layout<T: Archive>() {
    assert!(
        align_of::<T::Archived>() <= ALIGN,
        "an archived record may need an alignment of 8 at most: replace 128-bit numbers by pairs \
         of `u64`, and remove `align` attributes"
    );
    assert!(
        size_of::<T::Archived>() > 0,
        "a record without a byte cannot be counted: add a field to it"
    );
}

/// Encodes at the start of `into`: bytes used, or `None` when it does not fit.
fn encode<T: Archivable>(value: &T, into: &mut [u8]) -> Option<usize> {
    const { check_layout::<T>() };
    let room = into.len().min(BYTES_MAX);
    let into = Buffer::from(&mut into[..room]);
    // The thread's arena holds the resolvers of nested lists; it is kept, so nothing is allocated
    // in the long run.
    rkyv::util::with_arena(|arena| {
        let written =
            rkyv::api::low::to_bytes_in_with_alloc::<_, _, Failure>(value, into, arena.acquire());
        written.ok().map(|bytes| bytes.len())
    })
}

/// Writes prefix and trailing zeros around `len` encoded bytes: bytes used, or `None` when they do
/// not fit.
#[inline(always)]
fn frame(into: &mut [u8], len: usize) -> Option<usize> {
    let end = PREFIX + len;
    let padded = end.next_multiple_of(ALIGN);
    into.get_mut(end..padded)?.fill(0);
    into[..PREFIX].copy_from_slice(&(len as u64).to_le_bytes());
    Some(padded)
}

/// See [`Record::item`].
///
/// # Panics
/// When the encoding is longer than [`BYTES_MAX`].
pub fn item<'a, T>(value: &T, scratch: &'a mut Scratch) -> Item<'a, T>
where
    T: Archivable + Record<View = <T as Archive>::Archived>,
{
    let mut room = 0;
    let len = loop {
        let buffer = scratch.buffer(room);
        if let Some(len) = encode(value, buffer) {
            break len;
        }
        room = buffer.len() * 2;
        assert!(
            room <= BYTES_MAX * 2,
            "a record of type {} does not fit {BYTES_MAX} bytes: split it",
            std::any::type_name::<T>()
        );
    };
    // SAFETY: these bytes were encoded from a T just now, at an 8-aligned address.
    unsafe { from_stored(&scratch.bytes()[..len]) }
}

/// See [`Record::put`].
pub fn put<T: Archivable>(value: &T, into: &mut [u8]) -> Option<usize> {
    let len = encode(value, into.get_mut(PREFIX..)?)?;
    frame(into, len)
}

/// See [`Record::put_item`].
#[inline]
pub fn put_bytes(bytes: &[u8], into: &mut [u8]) -> Option<usize> {
    into.get_mut(PREFIX..PREFIX + bytes.len())?.copy_from_slice(bytes);
    frame(into, bytes.len())
}

/// See [`Record::item_len`].
#[inline(always)]
#[must_use]
pub fn framed_len(bytes: &[u8]) -> usize {
    PREFIX + bytes.len().next_multiple_of(ALIGN)
}

/// Takes the bytes of the next record off the front of a batch, without looking into them: a root
/// of type `View` lies inside them, aligned when the batch is.
///
/// # Errors
/// When the length leads out of the bytes, or has no place for the root.
#[inline]
pub fn take_bytes<'a, View>(bytes: &mut &'a [u8]) -> Result<&'a [u8], Fault> {
    let left = bytes.len() as u64;
    let Some((prefix, rest)) = bytes.split_first_chunk::<PREFIX>() else {
        return Err(Fault::RecordBytes { found: PREFIX as u64, left });
    };
    // The upper half of the prefix is zero: read as one number, a stray bit there is a length that
    // leads out.
    let found = u64::from_le_bytes(*prefix);
    let room = rest.len() as u64;
    let smallest = size_of::<View>() as u64;
    if found < smallest || found > room || found.next_multiple_of(ALIGN as u64) > room {
        return Err(Fault::RecordBytes { found, left });
    }
    let len = found as usize;
    if !(len - size_of::<View>()).is_multiple_of(align_of::<View>()) {
        return Err(Fault::Archive);
    }
    *bytes = &rest[len.next_multiple_of(ALIGN)..];
    Ok(&rest[..len])
}

/// See [`Record::take`].
///
/// # Errors
/// When the length leads out of the bytes, or the archive does not validate.
#[inline]
pub fn take<'a, T>(bytes: &mut &'a [u8]) -> Result<Item<'a, T>, Fault>
where
    T: Archivable + Record<View = <T as Archive>::Archived>,
{
    const { check_layout::<T>() };
    let own = take_bytes::<T::View>(bytes)?;
    let view = rkyv::api::low::access::<T::View, Failure>(own).map_err(|_| Fault::Archive)?;
    Ok(Item::new(view, own))
}

/// See [`Record::take_trusted`].
///
/// # Safety
/// `bytes` starts with a record that `take` accepted.
#[inline(always)]
pub unsafe fn take_trusted<'a, T>(bytes: &mut &'a [u8]) -> Item<'a, T>
where
    T: Archivable + Record<View = <T as Archive>::Archived>,
{
    // SAFETY: `take` found prefix, length and trailing zeros within `bytes`, and they have not
    // changed.
    unsafe {
        let len = u64::from_le_bytes(bytes.as_ptr().cast::<[u8; PREFIX]>().read()) as usize;
        let own = bytes.get_unchecked(PREFIX..PREFIX + len);
        *bytes = bytes.get_unchecked(PREFIX + len.next_multiple_of(ALIGN)..);
        from_stored(own)
    }
}

/// See [`Record::from_stored`].
///
/// # Safety
/// `bytes` were copied from [`Item::bytes`] of this type, and are 8-aligned.
#[inline(always)]
#[must_use]
pub unsafe fn from_stored<T>(bytes: &[u8]) -> Item<'_, T>
where
    T: Archivable + Record<View = <T as Archive>::Archived>,
{
    // SAFETY: the caller promises a valid archive with its root at the end.
    Item::new(unsafe { rkyv::access_unchecked::<T::Archived>(bytes) }, bytes)
}

/// See [`Record::to_owned`].
pub fn to_owned<T: Archivable>(view: &T::Archived) -> T {
    let owned: Result<T, Panic> = rkyv::api::low::deserialize(view);
    rkyv::rancor::ResultExt::always_ok(owned)
}

/// Implements [`Record`] for an rkyv type; `$schema` is an expression of type `u64`.
#[macro_export]
macro_rules! archived_record {
    ([$($generics:tt)*] $type:ty, $schema:expr) => {
        // The lifetime makes the bound one of its own: where it fails, there is no impl, and no
        // error per method.
        #[allow(unused_lifetimes, trivial_bounds, reason = "they are here for the errors only")]
        impl<$($generics)*> $crate::record::Record for $type
        where
            for<'bound> $type: $crate::record::archived::Archivable,
        {
            type View = <$type as $crate::rkyv::Archive>::Archived;
            const SIZE: Option<usize> = {
                $crate::record::archived::check_layout::<$type>();
                None
            };

            fn schema() -> u64 {
                const { $crate::record::archived::check_layout::<$type>() };
                $schema
            }

            #[inline]
            fn item<'a>(
                &'a self,
                scratch: &'a mut $crate::record::Scratch,
            ) -> $crate::record::Item<'a, Self> {
                $crate::record::archived::item(self, scratch)
            }

            #[inline]
            fn put(&self, into: &mut [u8]) -> Option<usize> {
                $crate::record::archived::put(self, into)
            }

            #[inline]
            fn put_item(item: $crate::record::Item<'_, Self>, into: &mut [u8]) -> Option<usize> {
                $crate::record::archived::put_bytes(item.bytes(), into)
            }

            #[inline(always)]
            fn item_len(item: $crate::record::Item<'_, Self>) -> usize {
                $crate::record::archived::framed_len(item.bytes())
            }

            #[inline]
            fn take<'a>(
                bytes: &mut &'a [u8],
            ) -> Result<$crate::record::Item<'a, Self>, $crate::fault::Fault> {
                $crate::record::archived::take(bytes)
            }

            #[inline(always)]
            unsafe fn take_trusted<'a>(bytes: &mut &'a [u8]) -> $crate::record::Item<'a, Self> {
                // SAFETY: passed on.
                unsafe { $crate::record::archived::take_trusted(bytes) }
            }

            #[inline(always)]
            unsafe fn from_stored(bytes: &[u8]) -> $crate::record::Item<'_, Self> {
                // SAFETY: passed on.
                unsafe { $crate::record::archived::from_stored(bytes) }
            }

            #[inline(always)]
            fn as_slice(_bytes: &[u8]) -> Option<&[Self::View]> {
                None
            }

            #[inline(always)]
            fn bytes_of(_values: &[Self]) -> Option<&[u8]> {
                None
            }

            #[inline]
            fn to_owned(view: &Self::View) -> Self {
                $crate::record::archived::to_owned(view)
            }
        }
    };
}

macro_rules! leaves {
    ($($type:ty),*) => {$(
        crate::archived_record!([] $type, crate::hash::schema(stringify!($type), &[]));
    )*};
}

leaves!(bool, char, String);

crate::archived_record!([T: Record] Option<T>, crate::hash::schema("option", &[T::schema()]));
crate::archived_record!([T: Record] Vec<T>, crate::hash::schema("list", &[T::schema()]));

macro_rules! tuples {
    ($($($part:ident)*;)*) => {$(
        crate::archived_record!(
            [$($part: Record),*] ($($part,)*),
            crate::hash::schema("tuple", &[$($part::schema()),*])
        );
    )*};
}

tuples! {
    A;
    A B;
    A B C;
    A B C D;
    A B C D E;
    A B C D E F;
    A B C D E F G;
    A B C D E F G H;
}
