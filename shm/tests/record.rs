//! The promises of both encodings: what goes in comes out, equal values have equal bytes, and no
//! bytes at all make a reader panic or look outside of them (R9).

use proptest::prelude::*;
use std::fmt::Debug;
use std::ops::Range;
use testudo_shm::fault::Fault;
use testudo_shm::record::{Batch, PREFIX, Record, Scratch};
use testudo_shm::zerocopy::IntoBytes;

#[testudo_shm::record(crate = testudo_shm)]
#[derive(Default)]
struct Trade {
    instrument: u64,
    price: f64,
    shares: u32,
    venue: u16,
    flags: [u8; 2],
}

#[testudo_shm::record(crate = testudo_shm)]
struct Quote {
    trades: [Trade; 2],
    at: u64,
}

#[testudo_shm::record(crate = testudo_shm)]
struct Pair(u32, u32);

#[testudo_shm::record(archived, crate = testudo_shm)]
struct Person {
    name: String,
    born: Option<i16>,
}

#[testudo_shm::record(archived, crate = testudo_shm)]
enum Message {
    Ping,
    Text(String),
    Trades(Vec<Trade>, u8),
    Note { id: u64, tags: Vec<(u32, String)>, initial: Option<char>, urgent: bool, by: Person },
}

/// Miri takes a thousand times as long: there only a sample of all changes is tried.
const MIRI_STEP: usize = if cfg!(miri) { 41 } else { 1 };

fn messages() -> Vec<Message> {
    let by = Person { name: "Ada, whose name is not short".into(), born: Some(1815) };
    let tags = vec![(7, "seven".into()), (8, "a tag too long to stand inline".into())];
    vec![
        Message::Note { id: 1 << 40, tags, initial: Some('ß'), urgent: true, by },
        Message::Ping,
        Message::Trades(vec![Trade { instrument: 3, price: 0.5, ..Trade::default() }; 3], 9),
        Message::Text("a text".into()),
    ]
}

/// An 8-aligned buffer of exactly `len` bytes in use, filled with `fill`.
struct Words {
    words: Vec<u64>,
    len: usize,
}

impl Words {
    fn filled(len: usize, fill: u8) -> Self {
        Self { words: vec![u64::from_ne_bytes([fill; 8]); len.div_ceil(8).max(1)], len }
    }

    fn of(bytes: &[u8]) -> Self {
        let mut words = Self::filled(bytes.len(), 0);
        words.bytes_mut().copy_from_slice(bytes);
        words
    }

    fn bytes(&self) -> &[u8] {
        &self.words.as_bytes()[..self.len]
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.words.as_mut_bytes()[..self.len]
    }
}

/// A batch of `values`, padded to eight as frames are, in a buffer that held `fill` before.
fn batch_over<T: Record>(values: &[T], fill: u8) -> Words {
    let mut words = Words::filled(1 << 16, fill);
    let mut used = 0;
    for value in values {
        used += value.put(&mut words.bytes_mut()[used..]).expect("64 KiB are enough");
    }
    words.len = used.next_multiple_of(8);
    words.bytes_mut()[used..].fill(0);
    words
}

fn round_trip<T: Record + PartialEq + Debug>(values: &[T]) {
    let words = batch_over(values, 0xCC);
    let batch = Batch::<T>::check(words.bytes(), values.len(), 0).expect("own bytes are valid");
    assert_eq!(batch.len(), values.len());
    let mut again = Words::filled(words.len, 0);
    let mut used = 0;
    for (item, value) in batch.iter().zip(values) {
        assert_eq!(&<T as Record>::to_owned(item.view), value);
        let mut scratch = Scratch::default();
        scratch.buffer(64).fill(0x55);
        let own = value.item(&mut scratch);
        assert_eq!(own.bytes(), item.bytes(), "bytes of {value:?}");
        let stored = Words::of(item.bytes());
        // SAFETY: these are a copy of an item's bytes, 8-aligned.
        let stored = unsafe { T::from_stored(stored.bytes()) };
        assert_eq!(&<T as Record>::to_owned(stored.view), value);
        let put = T::put_item(own, &mut again.bytes_mut()[used..]).expect("as long as before");
        assert_eq!(put, T::item_len(own));
        used += put;
    }
    assert_eq!(again.bytes(), words.bytes(), "put_item writes what put does");
}

#[test]
fn each_kind_of_record_comes_back() {
    round_trip(&[0u8, 1, 255]);
    round_trip(&[i64::MIN, -1, i64::MAX]);
    round_trip(&[0.0f64, -1.5, f64::INFINITY]);
    round_trip(&[[1u16, 2, 3], [4, 5, 6]]);
    round_trip(&[Trade { instrument: 1, price: 2.5, ..Trade::default() }, Trade::default()]);
    round_trip(&[Quote { trades: [Trade::default(); 2], at: 7 }]);
    round_trip(&[Pair(1, 2), Pair(3, 4)]);
    round_trip(&[true, false]);
    round_trip(&['a', 'ß', '\u{10FFFF}']);
    round_trip(&[String::new(), "inline".into(), "too long to stand inline".into()]);
    round_trip(&[None, Some(7u64), Some(u64::MAX)]);
    round_trip(&[vec![], vec![String::new(), "a".into()], vec!["x".repeat(1000)]]);
    round_trip(&[(1u64,), (2,)]);
    round_trip(&[("key".to_owned(), Trade::default(), Some(Pair(5, 6)))]);
    round_trip(&[(1u8, 2u16, 3u32, 4u64, 5i8, 6i16, "seven".to_owned(), [8u8; 3])]);
    round_trip(&[vec![vec![Some((1u8, "deep".to_owned()))]]]);
    round_trip(&messages());
}

#[test]
fn parts_that_are_records_make_tuples_options_and_lists_records_in_generic_code() {
    fn keyed<K: Record + Clone, V: Record + Clone>(key: &K, value: &V) -> Words {
        batch_over(&[(key.clone(), vec![Some(value.clone())])], 0)
    }
    let words = keyed(&"k".to_owned(), &Trade::default());
    assert!(Batch::<(String, Vec<Option<Trade>>)>::check(words.bytes(), 1, 0).is_ok());
}

#[test]
fn a_batch_of_plain_records_is_a_slice_and_one_of_archived_records_is_not() {
    let values = [Pair(1, 2), Pair(3, 4)];
    let words = batch_over(&values, 0);
    assert_eq!(words.len, 16);
    let batch = Batch::<Pair>::check(words.bytes(), 2, 0).expect("valid");
    assert_eq!(batch.as_slice(), Some(values.as_slice()));
    let words = batch_over(&[Some(1u64)], 0);
    let batch = Batch::<Option<u64>>::check(words.bytes(), 1, 0).expect("valid");
    assert_eq!(batch.as_slice(), None);
}

#[test]
fn a_record_that_does_not_fit_is_not_put_and_nothing_behind_is_touched() {
    for message in messages() {
        let whole = batch_over(std::slice::from_ref(&message), 0);
        for room in 0..whole.len {
            let mut words = Words::filled(whole.len + 8, 0xAB);
            assert_eq!(
                message.put(&mut words.bytes_mut()[..room]),
                None,
                "{room} of {}",
                whole.len
            );
            assert!(words.bytes()[room..].iter().all(|byte| *byte == 0xAB), "{room}");
            let mut scratch = Scratch::default();
            let item = message.item(&mut scratch);
            assert_eq!(Message::put_item(item, &mut words.bytes_mut()[..room]), None);
        }
    }
    assert_eq!(Pair(1, 2).put(&mut [0; 7]), None);
}

#[test]
fn bytes_depend_on_the_value_alone() {
    let clean = batch_over(&messages(), 0);
    for fill in [0xFF, 0xCC, 0x01] {
        assert_eq!(batch_over(&messages(), fill).bytes(), clean.bytes(), "over {fill:#x}");
    }
    // The same value elsewhere in a batch, and built another way.
    let mut long = Vec::with_capacity(100);
    long.push("x".to_owned() + "y");
    let twice = batch_over(&[vec!["xy".to_owned()], long], 0x77);
    let (first, second) = twice.bytes().split_at(twice.len / 2);
    assert_eq!(first, second);
    // Padding between fields and behind the smaller variants is zero.
    let ping = batch_over(&[Message::Ping], 0xFF);
    let payload = &ping.bytes()[PREFIX..];
    assert!(payload[1..].iter().all(|byte| *byte == 0), "{payload:?}");
}

#[test]
fn a_record_longer_than_the_scratch_makes_it_grow() {
    let mut scratch = Scratch::default();
    for shift in [0, 10, 20, 5] {
        let value = "x".repeat(1 << shift);
        assert_eq!(value.item(&mut scratch).view.as_str(), value);
    }
}

fn inside<T: ?Sized>(range: &Range<*const u8>, part: &T) {
    let start = std::ptr::from_ref(part).cast::<u8>();
    let end = start.wrapping_add(size_of_val(part));
    assert!(range.start <= start && end <= range.end, "a field lies outside the batch");
}

/// Reads all there is to read, and checks that it lies in `range`.
fn read_all(range: &Range<*const u8>, view: &ArchivedMessage) {
    inside(range, view);
    match view {
        ArchivedMessage::Ping => {}
        ArchivedMessage::Text(text) => inside(range, text.as_str()),
        ArchivedMessage::Trades(trades, _) => inside(range, trades.as_slice()),
        ArchivedMessage::Note { tags, by, .. } => {
            inside(range, tags.as_slice());
            tags.iter().for_each(|tag| inside(range, tag.1.as_str()));
            inside(range, by.name.as_str());
        }
    }
    assert!(!format!("{view:?}").is_empty());
    drop(<Message as Record>::to_owned(view));
}

/// Walks a batch that is not validated.
fn walk<T: Record>(bytes: &[u8], count: usize) -> Result<Batch<'_, T>, Fault> {
    // SAFETY: contents are read by the caller only where this program wrote them; prefixes may be
    // anything.
    unsafe { Batch::<T>::unvalidated(bytes, count, 0) }
}

/// Checks a batch of unknown bytes and reads what is accepted; true when it was.
fn survives(bytes: &[u8], count: usize) -> bool {
    let Ok(batch) = Batch::<Message>::check(bytes, count, 0) else {
        return false;
    };
    assert_eq!(batch.iter().count(), count);
    batch.iter().for_each(|item| read_all(&bytes.as_ptr_range(), item.view));
    true
}

#[test]
fn no_byte_of_an_archived_batch_can_make_a_reader_panic_or_leave_it() {
    let count = messages().len();
    let clean = batch_over(&messages(), 0);
    assert!(survives(clean.bytes(), count));
    let (mut refused, mut tried) = (0, 0);
    for at in (0..clean.len).step_by(MIRI_STEP) {
        for value in [0, 1, 0x7F, 0x80, 0xFF] {
            let mut words = Words::of(clean.bytes());
            words.bytes_mut()[at] = value;
            refused += usize::from(!survives(words.bytes(), count));
            tried += 1;
        }
    }
    assert!(refused > tried / 10, "only {refused} of {tried} changes were refused");
}

#[test]
fn no_pair_of_words_of_an_archived_batch_can_make_a_reader_panic_or_leave_it() {
    let one = batch_over(&messages()[..1], 0);
    for at in (0..one.len).step_by(4 * MIRI_STEP) {
        for next in (0..one.len).step_by(4 * MIRI_STEP) {
            for value in [[0u8; 4], [0xFF; 4], [0, 0, 0, 0x80], [8, 0, 0, 0]] {
                let mut words = Words::of(one.bytes());
                words.bytes_mut()[at..at + 4].copy_from_slice(&value);
                words.bytes_mut()[next..next + 4].copy_from_slice(&[0xF8, 0xFF, 0xFF, 0xFF]);
                survives(words.bytes(), 1);
            }
        }
    }
}

#[test]
fn a_truncated_batch_is_refused_at_every_length() {
    let count = messages().len();
    let clean = batch_over(&messages(), 0);
    for len in 0..clean.len {
        assert!(!survives(Words::of(&clean.bytes()[..len]).bytes(), count), "{len} bytes");
    }
    let trades = batch_over(&[Trade::default(); 3], 0);
    for len in 0..trades.len {
        let cut = Words::of(&trades.bytes()[..len]);
        let wanted = Fault::Count { found: 3, bytes: len as u64, at: 5 };
        assert_eq!(Batch::<Trade>::check(cut.bytes(), 3, 5).err(), Some(wanted));
    }
    let trades = Batch::<Trade>::check(trades.bytes(), 3, 5).expect("whole");
    assert_eq!(trades.bytes().len(), 72);
}

#[test]
fn any_bytes_are_plain_records() {
    for fill in [0, 1, 0x7F, 0x80, 0xFF] {
        let words = Words::filled(72, fill);
        let batch = Batch::<Trade>::check(words.bytes(), 3, 0).expect("any bytes");
        let venue = u16::from_ne_bytes([fill; 2]);
        assert!(batch.iter().all(|trade| trade.venue == venue));
    }
}

#[test]
fn a_length_prefix_that_leads_out_is_a_fault_with_the_length() {
    let clean = batch_over(&[Some(7u64)], 0);
    let left = clean.len as u64;
    for found in [0, left - 7, 1 << 32, u64::MAX, u64::MAX - 7, u64::MAX / 2] {
        let mut words = Words::of(clean.bytes());
        words.bytes_mut()[..PREFIX].copy_from_slice(&found.to_le_bytes());
        let fault = Batch::<Option<u64>>::check(words.bytes(), 1, 0).err();
        assert_eq!(fault, Some(Fault::RecordBytes { found, left }));
    }
}

#[test]
fn a_batch_that_is_misaligned_or_miscounted_is_refused() {
    let clean = batch_over(&[Some(7u64), None], 0);
    for count in [0, 1, 3, usize::MAX] {
        assert!(Batch::<Option<u64>>::check(clean.bytes(), count, 0).is_err(), "{count}");
        assert!(Batch::<Pair>::check(clean.bytes(), count, 0).is_err(), "{count}");
        assert!(Batch::<u8>::check(clean.bytes(), count, 0).is_err(), "{count}");
    }
    assert!(Batch::<u8>::check(&[], usize::MAX, 0).is_err());
    let three = batch_over(&[1u8, 2, 3], 0xFF);
    let three = Batch::<u8>::check(three.bytes(), 3, 0).expect("padded to eight");
    assert_eq!(three.as_slice(), Some([1, 2, 3].as_slice()));
    let mut shifted = Words::filled(clean.len + 8, 0);
    shifted.bytes_mut()[4..4 + clean.len].copy_from_slice(clean.bytes());
    let shifted = &shifted.bytes()[4..4 + clean.len];
    let wanted = Some(Fault::Alignment { at: 9 });
    assert_eq!(Batch::<Option<u64>>::check(shifted, 2, 9).err(), wanted);
    assert_eq!(Batch::<Pair>::check(shifted, 6, 9).err(), wanted);
}

#[test]
fn an_unvalidated_batch_is_still_walked_in_bounds() {
    let count = messages().len();
    let clean = batch_over(&messages(), 0);
    let batch = walk::<Message>(clean.bytes(), count).expect("valid");
    let owned = batch.iter().map(|item| <Message as Record>::to_owned(item.view));
    assert_eq!(owned.collect::<Vec<_>>(), messages());
    for wrong in [0, count - 1, count + 1, usize::MAX] {
        assert!(walk::<Message>(clean.bytes(), wrong).is_err(), "{wrong}");
    }
    let root = size_of::<ArchivedMessage>() as u64;
    for found in [0, 1, root - 1, root + 1, 1 << 32, (1 << 32) + root, u64::MAX] {
        let mut words = Words::of(clean.bytes());
        words.bytes_mut()[..PREFIX].copy_from_slice(&found.to_le_bytes());
        let fault = walk::<Message>(words.bytes(), count).err();
        assert!(fault.is_some(), "a length of {found} is taken");
    }
    let pairs = batch_over(&[Pair(1, 2)], 0);
    assert!(walk::<Pair>(pairs.bytes(), 1).is_ok());
    assert!(walk::<Pair>(pairs.bytes(), 2).is_err());
}

#[test]
fn a_list_that_claims_billions_of_elements_is_refused() {
    let clean = batch_over(&[vec![[1u8; 1]]], 0);
    let mut words = Words::of(clean.bytes());
    let len = u64::from_le_bytes(words.bytes()[..8].try_into().expect("eight bytes")) as usize;
    words.bytes_mut()[PREFIX + len - 4..PREFIX + len].copy_from_slice(&[0xFF; 4]);
    assert_eq!(Batch::<Vec<[u8; 1]>>::check(words.bytes(), 1, 0).err(), Some(Fault::Archive));
}

/// The same name with other fields: what a changed program would bring to an old state.
macro_rules! versions {
    ($($module:ident: [$($argument:tt)*] $type:item)*) => {
        mod versions {$(
            pub(super) mod $module {
                #[testudo_shm::record($($argument)* crate = testudo_shm)]
                #[allow(dead_code, reason = "only the layout is looked at")]
                $type
            }
        )*}

        fn schemas() -> Vec<(&'static str, u64)> {
            vec![$((stringify!($module), versions::$module::Event::schema())),*]
        }
    };
}

versions! {
    original: [] pub(crate) struct Event { id: u64, size: u64 }
    renamed: [] pub(crate) struct Event { id: u64, length: u64 }
    retyped: [] pub(crate) struct Event { id: u64, size: i64 }
    reordered: [] pub(crate) struct Event { size: u64, id: u64 }
    shorter: [] pub(crate) struct Event { id: u64 }
    archived: [archived,] pub(crate) struct Event { id: u64, size: u64 }
    optional: [archived,] pub(crate) struct Event { id: u64, size: Option<u64> }
    nested: [archived,] pub(crate) struct Event { id: u64, size: super::super::Person }
    variants: [archived,] pub(crate) enum Event { Id(u64), Size(u64) }
    swapped: [archived,] pub(crate) enum Event { Size(u64), Id(u64) }
    more: [archived,] pub(crate) enum Event { Id(u64), Size(u64, u64) }
}

#[test]
fn a_change_of_name_type_or_order_of_a_field_changes_the_schema() {
    let schemas = schemas();
    for (index, (name, schema)) in schemas.iter().enumerate() {
        for (other, other_schema) in &schemas[..index] {
            assert_ne!(schema, other_schema, "{name} and {other}");
        }
    }
    assert_eq!(versions::original::Event::schema(), versions::original::Event::schema());
    let parts = [u64::schema(), i64::schema(), f64::schema(), <[u8; 8]>::schema()];
    let lists = [Vec::<u64>::schema(), Option::<u64>::schema(), <(u64,)>::schema()];
    let distinct: std::collections::BTreeSet<u64> = parts.into_iter().chain(lists).collect();
    assert_eq!(distinct.len(), 7);
}

#[test]
fn no_record_needs_more_than_the_alignment_of_a_payload() {
    assert_eq!(Trade::SIZE, Some(24));
    assert_eq!(Message::SIZE, None);
    assert!(align_of::<<Message as Record>::View>() <= testudo_shm::record::ALIGN);
}

fn any_message() -> impl Strategy<Value = Message> {
    let person = (".{0,20}", any::<Option<i16>>()).prop_map(|(name, born)| Person { name, born });
    let trade = any::<(u64, i32, u32)>().prop_map(|(instrument, price, shares)| Trade {
        instrument,
        price: f64::from(price),
        shares,
        ..Trade::default()
    });
    let tags = prop::collection::vec((any::<u32>(), ".{0,20}"), 0..5);
    prop_oneof![
        Just(Message::Ping),
        ".{0,40}".prop_map(Message::Text),
        (prop::collection::vec(trade, 0..4), any::<u8>()).prop_map(|(t, n)| Message::Trades(t, n)),
        (any::<u64>(), tags, any::<Option<char>>(), any::<bool>(), person).prop_map(
            |(id, tags, initial, urgent, by)| Message::Note { id, tags, initial, urgent, by }
        ),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_messages_come_back(values in prop::collection::vec(any_message(), 0..6)) {
        round_trip(&values);
    }

    #[test]
    fn any_trades_come_back(values in prop::collection::vec(any::<(u64, u32, u32)>(), 0..20)) {
        let quotes = values.iter().map(|(at, a, b)| (*at, Pair(*a, *b)));
        round_trip(&quotes.collect::<Vec<_>>());
        round_trip(&values.iter().map(|(_, a, b)| Pair(*a, *b)).collect::<Vec<_>>());
    }

    #[test]
    fn damaged_messages_are_refused_or_read_in_bounds(
        values in prop::collection::vec(any_message(), 1..4),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let mut words = batch_over(&values, 0);
        for (at, byte) in damage {
            let at = at.index(words.len);
            words.bytes_mut()[at] = byte;
        }
        survives(words.bytes(), values.len());
    }

    #[test]
    fn random_bytes_are_refused_or_read_in_bounds(
        mut payload in prop::collection::vec(any::<u8>(), 1..160),
    ) {
        let len = payload.len() as u64;
        payload.resize(payload.len().next_multiple_of(8), 0);
        let bytes = [&len.to_le_bytes()[..], &payload].concat();
        survives(Words::of(&bytes).bytes(), 1);
    }
}
