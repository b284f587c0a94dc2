//! Adoption: a supervisor takes over a job whose supervisor died. Nothing is created; what there is
//! is found again through the keeper's descriptors.
//!
//! Order (each step has a kill point, see `testing`):
//! 1. read the description and the chronicle, plan the job as the workers do, compare the plan;
//! 2. map what the predecessor had mapped;
//! 3. take the reign: workers that the predecessor started and nobody has seen yet give way (R2;
//!    the predecessor's death was proven by the keeper, which has waited for it);
//! 4. find the workers: those that live are watched, those that died meanwhile are replaced;
//! 5. lead: the folder of checkpoints is opened beside that, since a disk may take its time.
//!
//! A supervisor that dies in any of these is followed by one that does the same from the start.
//! Workers notice nothing of it.
//!
//! Called by `launch`.

#![expect(unsafe_code, reason = "takes inherited descriptors; views mapped headers")]

use super::{Attempts, Launch, Play, Scene, supervisor_arena};
use crate::error::Error;
use crate::flow::Flow;
use crate::keeper::Line;
use crate::keeper::line::close_on_exec;
use crate::plan::Plan;
use crate::plan::layout::JOURNAL_BYTES;
use crate::supervisor::board::Board;
use crate::supervisor::checkpoint::Opening;
use crate::supervisor::chronicle::{Chronicle, Past, Scribe};
use crate::supervisor::console::Kept;
use crate::supervisor::description::{Description, SegmentFds};
use crate::supervisor::orders::Orders;
use crate::supervisor::outputs::Outputs;
use crate::supervisor::recover::Crew;
use crate::supervisor::report::Report;
use crate::supervisor::rewind::Rewinds;
use crate::supervisor::spawn::Spawner;
use crate::supervisor::steer::Steer;
use crate::supervisor::watch::{Events, Watch};
use crate::testing::{Point, point};
use std::os::fd::{FromRawFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use testudo_shm::header::{self, ControlHeader, WorkerHeader, control};
use testudo_shm::primitive::{Ordering, fence};
use testudo_shm::segment::Segment;

/// Takes a descriptor that the keeper left open for us.
fn inherited(fd: i32) -> OwnedFd {
    close_on_exec(fd);
    // SAFETY: the description and the role name each of the job's descriptors once, and nothing
    // else in this process knows them.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

impl Launch {
    /// Takes the job over and leads it to its end.
    pub(super) fn adopt(
        &mut self,
        line: &'static Line,
        build: &impl Fn(&Flow),
        events: &Arc<Events>,
        attempts: &mut Attempts,
    ) -> Result<Report, Error> {
        point(Point::AdoptBegin);
        let gone = || Error::Machine("there is no job to be taken over".into());
        let job = line.role().job.ok_or_else(gone)?;
        let (description, control) = Description::read(inherited(job.control), job.control_bytes)?;
        let (chronicle, notes) = Chronicle::open(inherited(job.chronicle))?;
        let past = Past::of(notes);
        self.settings = description.settings.clone();
        let plan = self.plan_again(&description, build)?;
        let checkpoints = description.checkpoints.clone();
        attempts.resumed = description.resumed();
        let outputs = Outputs::adopt(&plan, &past.locks, checkpoints.is_some());
        let notice = inherited(description.notice);
        let scene = Scene::adopt(&plan, description, control)?;
        point(Point::AdoptMapped);
        let watch = Watch::start(Arc::clone(events), notice, Some(line))?;
        scene.take_reign(line.role().reign);
        point(Point::AdoptReigns);
        let spawner = Spawner::new(Some(line));
        let mut crew = Crew::adopt(&plan, &self.settings, &scene, &watch, spawner, (line, &past))?;
        let rewinds = Rewinds::adopt(&plan, &scene.description.rewound, &mut crew);
        point(Point::AdoptCounted);
        if scene.control_header.control.load(Ordering::Acquire) & control::DRAIN != 0 {
            events.signals.fetch_max(1, Ordering::AcqRel);
        }
        if past.is_pausing {
            // Whoever had asked for the savepoint has been let go.
            scene.clear_control(control::PAUSE);
        }
        let begun_ns = past.begun_ns;
        let word = scene.control_header.folder.load(Ordering::Acquire);
        let board = Board::new(&plan, &self.settings, &scene, begun_ns);
        let metrics = board.serve_again(past.metrics.map(inherited));
        let mut orders = match past.socket.clone() {
            Some(kept) => Orders::adopt(kept, events, begun_ns),
            None => Orders::open(&self.settings, events, begun_ns, Some(line)),
        };
        orders.metrics = metrics.as_ref().map(|metrics| metrics.address());
        let console = past.console.map(|ends| Kept::adopt(&ends, chronicle.console()));
        let console = console.transpose()?;
        let mut scribe = Scribe::go_on(chronicle, &past);
        if past.socket.is_none() {
            scribe.note_socket(orders.kept());
        }
        let opening = checkpoints
            .map(|checkpoints| Opening::begin(&self.settings, checkpoints, past, (events, word)));
        let play = Play {
            plan: &plan,
            settings: &self.settings,
            scene: &scene,
            watch,
            crew,
            opening: opening.transpose()?,
            checkpointer: None,
            orders,
            rewinds,
            board,
            _metrics: metrics,
            steer: Steer::default(),
            scribe,
            keeper: Some(line),
        };
        play.lead(events, (outputs, console), &mut attempts.job)
    }

    /// Plans the job from what its workers were told.
    pub(crate) fn plan_again(
        &self,
        description: &Description,
        build: &impl Fn(&Flow),
    ) -> Result<Plan, Error> {
        let flow = Flow::with_surveys(Rc::new(self.settings.clone()), description.surveys.clone());
        build(&flow);
        let plan = Plan::new(&flow.draft.borrow(), &self.settings)?;
        if plan.hash == description.plan {
            return Ok(plan);
        }
        Err(Error::Plan(format!(
            "this program plans another job ({:016x}) than the one that runs ({:016x})",
            plan.hash, description.plan
        )))
    }
}

impl Play<'_> {
    /// Takes checkpoints once more, as soon as their folder is open.
    pub(super) fn look_for_folder(&mut self, events: &Arc<Events>) -> Result<(), Error> {
        let Some(found) = self.opening.as_mut().and_then(Opening::take) else { return Ok(()) };
        self.opening = None;
        let mut checkpointer = found.lead(self.plan, self.settings, self.scene, events)?;
        checkpointer.attend(self.board.externals.clone());
        self.checkpointer = Some(checkpointer);
        Ok(())
    }
}

impl Scene {
    /// Maps the segments of a job that is there.
    fn adopt(plan: &Plan, description: Description, control: Segment) -> Result<Self, Error> {
        let layout = &plan.layout;
        let supervisor = plan.supervisor();
        let misfit = || Error::Machine("the job has other segments than its plan".into());
        let laid = &layout.segments[..supervisor];
        if description.segments.len() != laid.len()
            || description.groups.len() != layout.groups.len()
        {
            return Err(misfit());
        }
        let mut segments = Vec::new();
        for (fds, laid) in description.segments.iter().zip(laid) {
            segments.push((Segment::adopt(inherited(fds.owner), laid.bytes)?, inherited(fds.peer)));
        }
        let mut groups = Vec::new();
        for (fds, laid) in description.groups.iter().zip(&layout.groups) {
            let group = |fd: &i32| Segment::adopt(inherited(*fd), laid.bytes);
            groups.push(fds.iter().map(group).collect::<Result<Vec<_>, _>>()?);
        }
        let mut follows = Vec::new();
        for (fds, laid) in description.follows.iter().zip(&layout.follows) {
            let take = |fds: SegmentFds, bytes| {
                let owner = Segment::adopt(inherited(fds.owner), bytes)?;
                Ok::<_, Error>((owner, inherited(fds.peer)))
            };
            let journal = take(fds.journal, JOURNAL_BYTES)?;
            follows.push([journal, take(fds.follower, laid.follower_bytes())?]);
        }
        let events = description.events.iter().flatten().map(|fd| inherited(*fd)).collect();
        let control_peer = control.read_only()?;
        let arena = supervisor_arena(plan, &control, &segments, &follows)?;
        // SAFETY: the fronts of all segments are mapped for good.
        let control_header =
            unsafe { header::at::<ControlHeader>(arena.at(layout.segments[supervisor].at)) };
        // SAFETY: as above.
        let header = |at: usize| unsafe { header::at::<WorkerHeader>(arena.at(at)) };
        let workers = laid.iter().map(|segment| header(segment.at)).collect();
        Ok(Self {
            control,
            control_peer,
            control_header,
            workers,
            arena,
            description,
            segments,
            groups,
            follows,
            events,
        })
    }

    /// From here on, workers that an earlier supervisor started and that have claimed nothing yet
    /// give way.
    fn take_reign(&self, reign: u32) {
        self.control_header.supervisor.store(std::process::id(), Ordering::Relaxed);
        self.control_header.reign.store(reign, Ordering::Release);
        // SYNC reign: pairs with the fence in `give_way`.
        fence(Ordering::SeqCst);
    }
}
