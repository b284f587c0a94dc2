//! The generator: record number n is a function of n alone, so it can be read again from any
//! position.
//!
//! Called through [`Source`].

use super::{Collect, Progress, Reader, Source, Subtask, Wishes};
use std::marker::PhantomData;
use std::sync::Arc;
use testudo_shm::record::Record;

/// Emits `make(n)` for n = index, index + count, … below `total`.
///
/// ```
/// use testudo::source::generator::Generator;
/// let squares = Generator::new(1_000, |n| n * n);
/// ```
#[derive(Debug)]
pub struct Generator<T, F> {
    total: u64,
    make: Arc<F>,
    of: PhantomData<fn() -> T>,
}

impl<T: Record, F: Fn(u64) -> T + 'static> Generator<T, F> {
    /// Record numbers 0 to `total`, `make` giving each record. `u64::MAX` never ends.
    pub fn new(total: u64, make: F) -> Self {
        Self { total, make: Arc::new(make), of: PhantomData }
    }
}

/// Records made before they are emitted together: making and routing are two tight loops then, not
/// one wide one.
const BLOCK: u64 = 64;

/// Reads one subtask's numbers.
#[derive(Debug)]
pub struct GeneratorReader<T, F> {
    /// Records made and not yet emitted: always none between two reads.
    block: Vec<T>,
    total: u64,
    step: u64,
    make: Arc<F>,
}

impl<T: Record, F: Fn(u64) -> T + 'static> Source for Generator<T, F> {
    type Out = T;
    type Position = u64;
    type Reader = GeneratorReader<T, F>;

    fn start(&self, subtask: Subtask) -> u64 {
        subtask.index as u64
    }

    fn open(&self, subtask: Subtask, _from: &u64) -> Result<Self::Reader, String> {
        let make = Arc::clone(&self.make);
        let block = Vec::with_capacity(BLOCK as usize);
        Ok(GeneratorReader { block, total: self.total, step: subtask.count as u64, make })
    }

    fn configure(&mut self, _survey: &str, wishes: &Wishes) -> Result<bool, String> {
        self.total = self.total.min(wishes.limit.unwrap_or(u64::MAX));
        Ok(true)
    }
}

impl<T: Record, F: Fn(u64) -> T + 'static> Reader<T, u64> for GeneratorReader<T, F> {
    #[inline]
    fn read(
        &mut self,
        position: &mut u64,
        max: usize,
        out: &mut impl Collect<T>,
    ) -> Result<Progress, String> {
        let left = self.total.saturating_sub(*position).div_ceil(self.step);
        let count = left.min(max as u64);
        let (first, step) = (*position, self.step);
        for block in (0..count).step_by(BLOCK as usize) {
            self.block.clear();
            let numbers = block..(block + BLOCK).min(count);
            self.block.extend(numbers.map(|index| (self.make)(first + index * step)));
            out.emit_all(&self.block);
        }
        *position = first + count * step;
        Ok(if count == left { Progress::End } else { Progress::More })
    }

    fn skip(&mut self, position: &mut u64) -> Result<Option<Vec<u8>>, String> {
        *position += self.step;
        Ok(Some(Vec::new()))
    }

    fn origin(&self, position: &u64) -> String {
        format!("number {position}")
    }
}
