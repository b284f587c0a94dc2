//! Chains: how a stage is built inside out. Each operator of a stream is a [`Link`]; a chain of
//! them ends at the stage's head (a source or an inlet) and, once its last operator is known,
//! becomes one type: the fused loop.
//!
//! Called by `stream` while a flow is described, and by the worker's attach to build what it runs.

use crate::error::Error;
use crate::exchange::account::{EdgeCount, Taking};
use crate::exchange::inlet::{Aside, Inlet};
use crate::operator::{Intake, Push, Stage};
use crate::plan::CounterKind;
use crate::source::Source;
use crate::source::stage::{Pace, SourcePart, SourceStage};
use crate::worker::StageRef;
use crate::worker::attach::Attach;
use std::cell::RefCell;
use std::marker::PhantomData;
use std::rc::Rc;
use testudo_shm::record::Record;
use testudo_state::KeyHash;

/// Everything of a stage before the operator that is added next.
pub trait Chain: Sized + 'static {
    /// What comes out of it.
    type Out: Record;

    /// Builds the stage with `next` behind everything in this chain.
    #[doc(hidden)]
    fn build<N: Push<Self::Out> + 'static>(
        self,
        attach: &mut Attach,
        next: N,
    ) -> Result<StageRef, Error>;
}

/// One operator's part in building.
pub trait Link<T: Record>: 'static {
    /// What comes out of it.
    type Out: Record;
    /// The operator in front of `N`.
    type Op<N: Push<Self::Out> + 'static>: Push<T> + 'static;

    /// Puts the operator in front of `next`.
    #[doc(hidden)]
    fn link<N: Push<Self::Out> + 'static>(
        self,
        attach: &mut Attach,
        next: N,
    ) -> Result<Self::Op<N>, Error>;
}

/// A chain and one more operator.
#[derive(Debug)]
pub struct Then<C, L> {
    pub(crate) chain: C,
    pub(crate) link: L,
}

impl<C: Chain, L: Link<C::Out>> Chain for Then<C, L> {
    type Out = L::Out;

    fn build<N: Push<L::Out> + 'static>(
        self,
        attach: &mut Attach,
        next: N,
    ) -> Result<StageRef, Error> {
        let operator = self.link.link(attach, next)?;
        self.chain.build(attach, operator)
    }
}

/// A stage that begins with a source.
pub struct SourceChain<S> {
    pub(crate) source: Rc<S>,
    pub(crate) operator: usize,
    pub(crate) stage: usize,
    pub(crate) rejects: Option<usize>,
    pub(crate) divide_limit: Option<u64>,
}

impl<S> std::fmt::Debug for SourceChain<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SourceChain(operator {})", self.operator)
    }
}

impl<S: Source> Chain for SourceChain<S> {
    type Out = S::Out;

    fn build<N: Push<S::Out> + 'static>(
        self,
        attach: &mut Attach,
        next: N,
    ) -> Result<StageRef, Error> {
        let name = attach.operator_name(self.operator);
        let mut parts = Vec::new();
        for part in attach.parts_of(self.stage) {
            attach.note_part(self.operator, part);
            let start = self.source.start(part);
            let position = attach.part_cell(self.operator, part, "position", start)?;
            let phase = attach.part_cell(self.operator, part, "phase", 0u64)?;
            let from = attach.cx.txn.get(position);
            let reader = self.source.open(part, &from);
            let reader = reader.map_err(|message| Error::job(&name, message))?;
            parts.push(SourcePart { reader, position, phase });
        }
        let [all_before, own_before] = attach.read_before(self.operator)?;
        let rejects = match self.rejects {
            None => None,
            Some(edge) => {
                let outlet = attach.outlet::<String, _>(edge, crate::exchange::route::Only)?;
                Some(Box::new(outlet) as Box<dyn Push<String>>)
            }
        };
        let settings = attach.settings();
        let reader = attach.reader(self.operator);
        let (index, count) = (reader.index as u64, reader.count as u64);
        let share = |total: u64| total / count + u64::from(index < total % count);
        let rejects_max = settings.max_rejects.unwrap_or(u64::MAX);
        let sources = attach.source_subtasks() as f64;
        let phase = format!("{}/phase", attach.plan.operators[self.operator].uid());
        let stage: StageRef = Rc::new(RefCell::new(SourceStage {
            parts,
            stage: self.stage as u32,
            aside: attach.aside(self.stage),
            turn: 0,
            // In another shape the end is said again, to consumers that have not heard it.
            phase: attach.named_cell(&phase, 0u64)?,
            records: attach.counter(self.operator, CounterKind::Out),
            rejected: attach.counter(self.operator, CounterKind::Rejected),
            rejects,
            rejects_max,
            pace: settings.rate.map(|rate| Pace::new(rate as f64 / sources)),
            limit: self.divide_limit.map(|all| own_before + share(all.saturating_sub(all_before))),
            wake: None,
            operator: self.operator,
            is_blocked: false,
            name,
            next,
            of: PhantomData,
        }));
        Ok(stage)
    }
}

/// A stage that begins behind one or more exchanges.
pub struct InletChain<T: Record> {
    pub(crate) edges: Vec<usize>,
    pub(crate) stage: usize,
    /// Where records are routed by key: the hash of a record's key.
    pub(crate) key: Option<KeyOf<T>>,
}

/// The hash of a record's key.
pub(crate) type KeyOf<T> = Rc<dyn Fn(&<T as Record>::View) -> KeyHash>;

impl<T: Record> std::fmt::Debug for InletChain<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "InletChain(stage {}, edges {:?})", self.stage, self.edges)
    }
}

impl<T: Record> Chain for InletChain<T> {
    type Out = T;

    fn build<N: Push<T> + 'static>(self, attach: &mut Attach, next: N) -> Result<StageRef, Error> {
        let name = format!("stage-{}", self.stage);
        let mut channels = Vec::new();
        let mut local = Vec::new();
        let mut rests = Vec::new();
        let mut of_channel = Vec::new();
        for &edge in &self.edges {
            let first = channels.len();
            attach.channels(edge, &mut channels, &mut local)?;
            attach.rests::<T>(edge, first, self.key.as_ref(), &mut rests)?;
            of_channel.resize(channels.len(), edge);
        }
        let lettered = |&edge: &usize| (edge, attach.edge_count(edge, EdgeCount::Lettered));
        let edges = self.edges.iter().map(lettered).collect();
        let aside = Aside { all: attach.aside(self.stage), edges, channels: of_channel, local: 0 };
        let takings = self
            .edges
            .iter()
            .map(|&edge| (edge, Taking::new(attach.edge_count(edge, EdgeCount::Taken))));
        let takings = takings.collect();
        let inlet = Rc::new(RefCell::new(Inlet {
            next,
            stage: self.stage as u32,
            aside,
            absent: attach.absent(&channels),
            takings,
            counts_rests: attach.counts_rests(),
            channels,
            rests,
            rested: attach.rested_cell(self.stage)?,
            watermark: attach.watermark_cell(self.stage, None)?,
            done: attach.named_cell(&format!("{name}/done"), 0u64)?,
            of: PhantomData,
        }));
        for (edge, channel) in local {
            let intake: Rc<RefCell<dyn Intake<T>>> = Rc::<RefCell<Inlet<T, N>>>::clone(&inlet);
            attach.offer_intake(edge, channel, intake);
        }
        let stage: Rc<RefCell<dyn Stage>> = inlet;
        Ok(stage)
    }
}
