//! Regions: the connected components of the execution graph. Tasks of different regions exchange no
//! data, so a snapshot of one region fits any snapshot of another.
//!
//! In a running job a task is a worker process: all its subtasks share one transaction and one
//! fate. Two workers are in one region when a ring connects them, in whichever direction and over
//! however many others.
//!
//! Invariants: each task is in exactly one region; regions are numbered by their first task.
//!
//! Called by the supervisor when a job is set up, and by the bench.

/// The regions of a job.
///
/// ```
/// use testudo::checkpoint::regions::Regions;
///
/// let regions = Regions::of(5, &[(3, 1), (0, 4)]);
/// assert_eq!(regions.count(), 3);
/// assert_eq!(regions.tasks(1), [1, 3]);
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Regions {
    /// Each task's region.
    of_task: Vec<usize>,
    /// Each region's tasks, in order.
    tasks: Vec<Vec<usize>>,
}

impl Regions {
    /// The regions of tasks `0..tasks` with these edges.
    ///
    /// # Panics
    /// When an edge names a task that there is not: the plan would be wrong.
    #[must_use]
    pub fn of(tasks: usize, edges: &[(usize, usize)]) -> Self {
        let mut forest = Forest { parents: (0..tasks).collect(), sizes: vec![1; tasks] };
        for &(from, to) in edges {
            forest.join(from, to);
        }
        let mut numbers = vec![None; tasks];
        let mut regions = Self { of_task: Vec::with_capacity(tasks), tasks: Vec::new() };
        for task in 0..tasks {
            let number = *numbers[forest.root(task)].get_or_insert_with(|| {
                regions.tasks.push(Vec::new());
                regions.tasks.len() - 1
            });
            regions.of_task.push(number);
            regions.tasks[number].push(task);
        }
        regions
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.tasks.len()
    }

    /// How many tasks there are.
    #[must_use]
    pub fn task_count(&self) -> usize {
        self.of_task.len()
    }

    /// The region of a task.
    ///
    /// # Panics
    /// When there is no such task.
    #[inline]
    #[must_use]
    pub fn of_task(&self, task: usize) -> usize {
        self.of_task[task]
    }

    /// The tasks of a region, in order.
    ///
    /// # Panics
    /// When there is no such region.
    #[must_use]
    pub fn tasks(&self, region: usize) -> &[usize] {
        &self.tasks[region]
    }
}

/// Union-find: trees whose roots stand for sets.
struct Forest {
    parents: Vec<usize>,
    sizes: Vec<usize>,
}

impl Forest {
    /// The root of a task's tree; halves the path on the way.
    fn root(&mut self, mut task: usize) -> usize {
        while self.parents[task] != task {
            self.parents[task] = self.parents[self.parents[task]];
            task = self.parents[task];
        }
        task
    }

    /// Makes one set of two, the smaller under the larger.
    fn join(&mut self, one: usize, other: usize) {
        let (mut large, mut small) = (self.root(one), self.root(other));
        if large == small {
            return;
        }
        if self.sizes[large] < self.sizes[small] {
            (large, small) = (small, large);
        }
        self.parents[small] = large;
        self.sizes[large] += self.sizes[small];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tasks_without_edges_are_regions_of_their_own() {
        let regions = Regions::of(3, &[]);
        assert_eq!(regions.count(), 3);
        assert_eq!((0..3).map(|task| regions.of_task(task)).collect::<Vec<_>>(), [0, 1, 2]);
        assert_eq!(Regions::of(0, &[]).count(), 0);
    }

    #[test]
    fn regions_are_numbered_by_their_first_task() {
        let regions = Regions::of(6, &[(5, 0), (4, 2), (2, 1)]);
        assert_eq!(
            (0..6).map(|task| regions.of_task(task)).collect::<Vec<_>>(),
            [0, 1, 1, 2, 1, 0]
        );
        assert_eq!(regions.tasks(1), [1, 2, 4]);
        assert_eq!(regions.task_count(), 6);
    }

    #[test]
    fn an_exchange_between_all_is_one_region() {
        let all: Vec<_> = (0..40).flat_map(|from| (0..40).map(move |to| (from, to))).collect();
        assert_eq!(Regions::of(40, &all).count(), 1);
        let chain: Vec<_> = (1..1000).rev().map(|task| (task, task - 1)).collect();
        assert_eq!(Regions::of(1000, &chain).count(), 1);
    }

    #[test]
    fn regions_are_what_walking_the_edges_reaches() {
        let mut state = 7u64;
        for _ in 0..200 {
            let mut below = |bound: usize| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (state >> 33) as usize % bound
            };
            let tasks = 1 + below(30);
            let edges: Vec<_> = (0..below(40)).map(|_| (below(tasks), below(tasks))).collect();
            let regions = Regions::of(tasks, &edges);
            for first in 0..tasks {
                let mut reached = vec![false; tasks];
                reached[first] = true;
                for _ in 0..tasks {
                    for &(a, b) in &edges {
                        let either = reached[a] || reached[b];
                        (reached[a], reached[b]) = (either, either);
                    }
                }
                let same = |task: usize| regions.of_task(task) == regions.of_task(first);
                assert!((0..tasks).all(|task| same(task) == reached[task]), "{edges:?}");
            }
        }
    }
}
