//! The `record` attribute: makes a struct or an enum a Testudo record.
//!
//! The expansion adds derives and implementations around the type and never changes its fields. All
//! paths in it go through one crate path, so that a user needs no dependency but `testudo`.

mod input;

mod message;

mod plain;

mod archived;

use proc_macro::TokenStream;

/// Makes a type a record: a value that can travel between workers and live in state.
///
/// # Plain records
///
/// `#[record]` on a struct of numbers, arrays of them and other plain records. Its bytes are read
/// where they lie, a batch of it is a slice. The attribute adds `#[repr(C)]` and derives `Clone`,
/// `Copy`, `Debug`, `PartialEq` and zerocopy's traits. Derives of your own stand *below* the
/// attribute; what they have is not derived twice.
///
/// ```
/// use testudo_shm::record::{Batch, Record};
///
/// #[testudo_shm::record(crate = testudo_shm)]
/// #[derive(Default)]
/// struct Trade {
///     instrument: u64,
///     price: f64,
///     shares: u32,
///     venue: u16,
///     flags: [u8; 2],
/// }
///
/// let mut words = [0u64; 3];
/// let bytes = zerocopy::IntoBytes::as_mut_bytes(&mut words);
/// Trade { instrument: 7, price: 1.5, ..Default::default() }.put(bytes).expect("24 bytes fit");
/// let batch = Batch::<Trade>::check(bytes, 1, 0).expect("any bytes are a plain record");
/// assert_eq!(batch.as_slice().expect("plain")[0].price, 1.5);
/// ```
///
/// A plain record has no padding, since stray bytes would make equal keys differ. The compiler says
/// where it is: "field `kind` of `Event` is followed by 3 bytes of padding: add a field `_pad: [u8;
/// 3]` after it, or put larger fields first".
///
/// ```compile_fail
/// #[testudo_shm::record(crate = testudo_shm)]
/// struct Event {
///     kind: u8,
///     amount: u32,
/// }
/// ```
///
/// Padding at the end counts as well, and inside a nested record's place:
///
/// ```compile_fail
/// #[testudo_shm::record(crate = testudo_shm)]
/// struct Event {
///     amount: u64,
///     kind: u8,
/// }
/// ```
///
/// With the bytes named it is a record:
///
/// ```
/// #[testudo_shm::record(crate = testudo_shm)]
/// struct Event {
///     amount: u64,
///     kind: u8,
///     _pad: [u8; 7],
/// }
/// ```
///
/// What is not plain is refused, with a pointer to `#[record(archived)]`:
///
/// ```compile_fail
/// #[testudo_shm::record(crate = testudo_shm)]
/// struct Person {
///     name: String,
/// }
/// ```
///
/// ```compile_fail
/// #[testudo_shm::record(crate = testudo_shm)]
/// enum Answer {
///     Yes,
///     No,
/// }
/// ```
///
/// # Archived records
///
/// `#[record(archived)]` on a struct or an enum whose fields are records: strings, lists, options,
/// tuples, `bool`, plain and archived records. It is written with rkyv and read in place: closures
/// see `&ArchivedPerson`, whose strings are `ArchivedString` (use it as `&str`) and whose numbers
/// are read with `to_native()`. The attribute derives rkyv's traits, `Clone`, `Debug` and
/// `PartialEq`, and `Debug` and `PartialEq` for the archived type.
///
/// ```
/// use testudo_shm::record::{Record, Scratch};
///
/// #[testudo_shm::record(archived, crate = testudo_shm)]
/// enum Answer {
///     Yes,
///     No { because: String, alternatives: Vec<String> },
/// }
///
/// let no = Answer::No { because: "it rains".into(), alternatives: vec!["tomorrow".into()] };
/// let mut scratch = Scratch::default();
/// let item = no.item(&mut scratch);
/// assert!(matches!(item.view, ArchivedAnswer::No { because, .. } if because == "it rains"));
/// assert_eq!(<Answer as Record>::to_owned(item.view), no);
/// ```
///
/// A field that is no record is refused. Maps are among these, since their order, and so their
/// bytes, differ from process to process: use a `Vec` of pairs.
///
/// ```compile_fail
/// #[testudo_shm::record(archived, crate = testudo_shm)]
/// struct Counts {
///     by_word: std::collections::HashMap<String, u64>,
/// }
/// ```
///
/// Neither form takes type parameters (a layout must have one name), nor contains itself (its depth
/// could not be bounded before it is read):
///
/// ```compile_fail
/// #[testudo_shm::record(archived, crate = testudo_shm)]
/// struct Pair<T> {
///     both: (T, T),
/// }
/// ```
///
/// ```compile_fail
/// #[testudo_shm::record(archived, crate = testudo_shm)]
/// struct Tree {
///     children: Vec<Tree>,
/// }
/// ```
///
/// # Arguments
///
/// - `archived`: the archived form;
/// - `crate = path`: where `testudo_shm` is found; `::testudo::shm` when absent.
#[proc_macro_attribute]
pub fn record(arguments: TokenStream, item: TokenStream) -> TokenStream {
    let parsed = input::Input::parse(arguments.into(), item.into());
    let expanded = parsed.and_then(|input| match input.archived {
        true => archived::expand(&input),
        false => plain::expand(&input),
    });
    expanded.unwrap_or_else(|refused| refused.tokens()).into()
}
