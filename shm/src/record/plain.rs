//! Plain records: the trait's methods for any zerocopy type, and the types that are records
//! already.
//!
//! Called by the code that `#[testudo::record]` generates. `unsafe` only where zerocopy's own
//! checks were made before.

use super::{ALIGN, Item, Record};
use crate::fault::Fault;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// What a plain record must be: any bit pattern valid, no padding, no pointer, freely copied.
pub trait PlainRecord: FromBytes + IntoBytes + Immutable + KnownLayout + Copy + 'static {}
impl<T: FromBytes + IntoBytes + Immutable + KnownLayout + Copy + 'static> PlainRecord for T {}

/// What stands in a field of a plain record: exactly the plain records.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot be a field of a plain record",
    label = "not plain: not every bit pattern is valid, or its size is not fixed",
    note = "write `#[record(archived)]` on the type with this field: it takes any record as a field"
)]
pub trait PlainField {}

/// Size of a plain record. Refuses, at compile time, what a batch cannot hold.
#[must_use]
pub const fn size<T>() -> usize {
    assert!(align_of::<T>() <= ALIGN, "a plain record may need an alignment of 8 at most");
    assert!(size_of::<T>() > 0, "a record without a byte cannot be counted: add a field to it");
    size_of::<T>()
}

/// See [`Record::put`].
#[inline(always)]
pub fn put<T: PlainRecord>(value: &T, into: &mut [u8]) -> Option<usize> {
    value.write_to_prefix(into).ok()?;
    Some(size_of::<T>())
}

/// See [`Record::take`].
///
/// # Errors
/// When the bytes end before the record does, or are misaligned for it.
#[inline(always)]
pub fn take<'a, T: PlainRecord + Record<View = T>>(
    bytes: &mut &'a [u8],
) -> Result<Item<'a, T>, Fault> {
    let whole = *bytes;
    let Ok((view, rest)) = T::ref_from_prefix(whole) else {
        return Err(Fault::RecordBytes { found: size_of::<T>() as u64, left: whole.len() as u64 });
    };
    *bytes = rest;
    Ok(Item::new(view, &whole[..size_of::<T>()]))
}

/// See [`Record::take_trusted`].
///
/// # Safety
/// At least `size_of::<T>()` bytes, aligned for `T`.
#[inline(always)]
pub unsafe fn take_trusted<'a, T: PlainRecord + Record<View = T>>(
    bytes: &mut &'a [u8],
) -> Item<'a, T> {
    debug_assert!(bytes.len() >= size_of::<T>());
    // SAFETY: the caller promises length and alignment; any bit pattern is a T.
    unsafe {
        let view = &*bytes.as_ptr().cast::<T>();
        let own = std::slice::from_raw_parts(bytes.as_ptr(), size_of::<T>());
        let rest = bytes.len() - size_of::<T>();
        *bytes = std::slice::from_raw_parts(bytes.as_ptr().add(size_of::<T>()), rest);
        Item::new(view, own)
    }
}

/// See [`Record::as_slice`].
#[inline(always)]
pub fn as_slice<T: PlainRecord>(bytes: &[u8]) -> Option<&[T]> {
    <[T]>::ref_from_bytes(bytes).ok()
}

/// Implements [`Record`] for a plain type that rkyv knows; `$schema` is an expression of type
/// `u64`.
#[macro_export]
macro_rules! plain_record {
    ([$($generics:tt)*] $type:ty, $schema:expr) => {
        impl<$($generics)*> $crate::record::plain::PlainField for $type {}

        // The lifetime makes the bound one of its own: where it fails, there is no impl, and the
        // only errors are those which the attribute's assertions make, instead of one per method
        // here.
        #[allow(unused_lifetimes, trivial_bounds, reason = "they are here for the errors only")]
        impl<$($generics)*> $crate::record::Record for $type
        where
            for<'bound> $type: $crate::record::plain::PlainRecord,
        {
            type View = Self;
            const SIZE: Option<usize> = Some($crate::record::plain::size::<Self>());

            fn schema() -> u64 {
                const { $crate::record::plain::size::<Self>() };
                $schema
            }

            #[inline(always)]
            fn item<'a>(
                &'a self,
                _scratch: &'a mut $crate::record::Scratch,
            ) -> $crate::record::Item<'a, Self> {
                $crate::record::Item::new(self, $crate::zerocopy::IntoBytes::as_bytes(self))
            }

            #[inline(always)]
            fn put(&self, into: &mut [u8]) -> Option<usize> {
                $crate::record::plain::put(self, into)
            }

            #[inline(always)]
            fn put_item(item: $crate::record::Item<'_, Self>, into: &mut [u8]) -> Option<usize> {
                $crate::record::plain::put(item.view, into)
            }

            #[inline(always)]
            fn item_len(_item: $crate::record::Item<'_, Self>) -> usize {
                size_of::<Self>()
            }

            #[inline(always)]
            fn take<'a>(
                bytes: &mut &'a [u8],
            ) -> Result<$crate::record::Item<'a, Self>, $crate::fault::Fault> {
                $crate::record::plain::take(bytes)
            }

            #[inline(always)]
            unsafe fn take_trusted<'a>(bytes: &mut &'a [u8]) -> $crate::record::Item<'a, Self> {
                // SAFETY: passed on.
                unsafe { $crate::record::plain::take_trusted(bytes) }
            }

            #[inline(always)]
            unsafe fn from_stored(bytes: &[u8]) -> $crate::record::Item<'_, Self> {
                let mut rest = bytes;
                // SAFETY: passed on.
                unsafe { $crate::record::plain::take_trusted(&mut rest) }
            }

            #[inline(always)]
            fn as_slice(bytes: &[u8]) -> Option<&[Self]> {
                $crate::record::plain::as_slice(bytes)
            }

            #[inline(always)]
            fn bytes_of(values: &[Self]) -> Option<&[u8]> {
                Some($crate::zerocopy::IntoBytes::as_bytes(values))
            }

            #[inline(always)]
            fn to_owned(view: &Self) -> Self {
                *view
            }
        }
    };
}

/// Lets a plain type be part of archived records: it is its own archive, and a list of it is one
/// copy.
#[macro_export]
macro_rules! plain_archive {
    ($type:ty) => {
        // SAFETY: a plain record is repr(C) of fixed-size numbers, without padding or interior
        // mutability, and Testudo runs on little-endian machines only.
        unsafe impl $crate::rkyv::Portable for $type {}

        // SAFETY: no padding (zerocopy's IntoBytes has proved it).
        unsafe impl $crate::rkyv::traits::NoUndef for $type {}

        // SAFETY: any bit pattern is valid (zerocopy's FromBytes has proved it).
        unsafe impl<C> $crate::rkyv::bytecheck::CheckBytes<C> for $type
        where
            C: $crate::rkyv::rancor::Fallible + ?Sized,
        {
            #[inline(always)]
            unsafe fn check_bytes(_: *const Self, _: &mut C) -> Result<(), C::Error> {
                Ok(())
            }
        }

        impl $crate::rkyv::Archive for $type {
            // SAFETY: the archived form is the value itself, without padding.
            const COPY_OPTIMIZATION: $crate::rkyv::traits::CopyOptimization<Self> =
                unsafe { $crate::rkyv::traits::CopyOptimization::enable() };

            type Archived = Self;
            type Resolver = ();

            #[inline(always)]
            fn resolve(&self, (): (), out: $crate::rkyv::Place<Self>) {
                out.write(*self);
            }
        }

        impl<S> $crate::rkyv::Serialize<S> for $type
        where
            S: $crate::rkyv::rancor::Fallible + ?Sized,
        {
            #[inline(always)]
            fn serialize(&self, _: &mut S) -> Result<(), S::Error> {
                Ok(())
            }
        }

        impl<D> $crate::rkyv::Deserialize<Self, D> for $type
        where
            D: $crate::rkyv::rancor::Fallible + ?Sized,
        {
            #[inline(always)]
            fn deserialize(&self, _: &mut D) -> Result<Self, D::Error> {
                Ok(*self)
            }
        }
    };
}

macro_rules! numbers {
    ($($type:ty),*) => {$(
        crate::plain_record!([] $type, crate::hash::schema(stringify!($type), &[]));
    )*};
}

numbers!(u8, u16, u32, u64, i8, i16, i32, i64, f32, f64);

crate::plain_record!(
    [T: PlainRecord + Record, const N: usize] [T; N],
    crate::hash::schema("array", &[T::schema(), N as u64])
);
