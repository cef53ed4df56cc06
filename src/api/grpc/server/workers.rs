//! The threads that serve connections. Each is a runtime of its own: what a connection needs never moves
//! between threads, and a commit of the journal wakes each of them once.

use std::{
    future::Future,
    io,
    num::NonZeroUsize,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use tokio::{
    runtime::{Builder, Handle},
    time::timeout,
};
use tokio_util::{
    sync::CancellationToken,
    task::{AbortOnDropHandle, TaskTracker, task_tracker::TaskTrackerToken},
};
use tracing::{error, warn};

/// How long the threads may take to end once they were told.
const END_WITHIN: Duration = Duration::from_secs(5);

/// The threads. They end with [`Workers::end`], or when this is dropped.
#[derive(Debug)]
pub struct Workers {
    all: Vec<Worker>,
    end: CancellationToken,
    /// Hold the places of the threads, each until it has ended.
    running: TaskTracker,
}

#[derive(Clone, Debug)]
struct Worker {
    runtime: Handle,
    connections: Arc<AtomicUsize>,
}

/// A connection's place on a thread, for as long as this lives.
#[derive(Debug)]
pub(super) struct WorkerSlot(Worker);

impl Workers {
    /// Starts `count` threads. One that ends by itself, which is a bug, cancels `failed`.
    ///
    /// # Errors
    /// When the system gives no more threads or descriptors.
    pub fn start(count: NonZeroUsize, failed: &CancellationToken) -> io::Result<Self> {
        // Those that were started end with it if the next one cannot be.
        let mut workers =
            Self { all: vec![], end: CancellationToken::new(), running: TaskTracker::new() };
        for number in 0..count.get() {
            let (started, handle) = mpsc::sync_channel(1);
            let ending = Ending {
                end: workers.end.clone(),
                failed: failed.clone(),
                _running: workers.running.token(),
            };
            thread::Builder::new().name(format!("serve-{number}")).spawn(move || {
                let ending = ending;
                match Builder::new_current_thread().enable_all().build() {
                    Ok(runtime) => {
                        // Nobody waits for it if the start has failed.
                        let _ = started.send(Ok(runtime.handle().clone()));
                        // What is left at the end goes with the runtime.
                        runtime.block_on(ending.end.cancelled());
                    }
                    Err(error) => drop(started.send(Err(error))),
                }
            })?;
            let runtime = handle.recv().map_err(io::Error::other)??;
            workers.all.push(Worker { runtime, connections: Arc::default() });
        }
        workers.running.close();
        Ok(workers)
    }

    /// A place on the thread with the fewest connections.
    pub(super) fn least_busy(&self) -> WorkerSlot {
        let connections = |worker: &&Worker| worker.connections.load(Ordering::Relaxed);
        // There is at least one.
        let worker = self.all.iter().min_by_key(connections).unwrap_or(&self.all[0]);
        worker.connections.fetch_add(1, Ordering::Relaxed);
        WorkerSlot(worker.clone())
    }

    /// Whether nobody has a place.
    pub(super) fn are_idle(&self) -> bool {
        self.all.iter().all(|worker| worker.connections.load(Ordering::Acquire) == 0)
    }

    /// Ends the threads, and what still runs on them.
    pub async fn end(&self) {
        self.end.cancel();
        if timeout(END_WITHIN, self.running.wait()).await.is_err() {
            warn!("a serving thread did not end in time");
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.end.cancel();
    }
}

/// Tells that a thread has ended, however it did.
struct Ending {
    end: CancellationToken,
    failed: CancellationToken,
    _running: TaskTrackerToken,
}

impl Drop for Ending {
    fn drop(&mut self) {
        if !self.end.is_cancelled() {
            error!("a serving thread has ended");
            self.failed.cancel();
        }
    }
}

impl WorkerSlot {
    /// Runs `task` on this place's thread, which it keeps until its end; dropped before, it ends too.
    pub(super) fn run<T: Send + 'static>(
        self,
        task: impl Future<Output = T> + Send + 'static,
    ) -> AbortOnDropHandle<T> {
        let runtime = self.0.runtime.clone();
        AbortOnDropHandle::new(runtime.spawn(async move {
            let _seat = self;
            task.await
        }))
    }
}

impl Drop for WorkerSlot {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn workers(count: usize) -> Workers {
        Workers::start(NonZeroUsize::new(count).unwrap(), &CancellationToken::new()).unwrap()
    }

    /// Takes a place that it keeps until it is dropped; the thread's name.
    async fn sit(workers: &Workers) -> (String, AbortOnDropHandle<()>) {
        let (tell, told) = tokio::sync::oneshot::channel();
        let sitting = workers.least_busy().run(async move {
            tell.send(thread::current().name().unwrap_or_default().to_owned()).unwrap();
            std::future::pending::<()>().await;
        });
        (told.await.unwrap(), sitting)
    }

    #[tokio::test]
    async fn connections_go_to_the_thread_that_has_the_fewest() {
        let workers = workers(3);
        let mut seats = vec![];
        for expected in ["serve-0", "serve-1", "serve-2", "serve-0"] {
            let (thread, seat) = sit(&workers).await;
            assert_eq!(thread, expected);
            seats.push(seat);
        }
        let second = seats.remove(1);
        second.abort();
        let _ = second.await;
        assert_eq!(sit(&workers).await.0, "serve-1");
        assert!(!workers.are_idle());
        workers.end().await;
        assert!(workers.are_idle());
    }

    #[tokio::test]
    async fn what_still_runs_at_the_end_is_cut_and_that_is_no_failure() {
        let failed = CancellationToken::new();
        let workers = Workers::start(NonZeroUsize::MIN, &failed).unwrap();
        let (_, endless) = sit(&workers).await;
        workers.end().await;
        assert!(endless.await.is_err());
        assert!(!failed.is_cancelled());
    }

    #[tokio::test]
    async fn a_thread_that_ends_by_itself_is_told() {
        let failed = CancellationToken::new();
        let ending = Ending {
            end: CancellationToken::new(),
            failed: failed.clone(),
            _running: TaskTracker::new().token(),
        };
        let panicked = thread::spawn(move || {
            let _ending = ending;
            panic!("a fault that the test is about");
        });
        failed.cancelled().await;
        assert!(panicked.join().is_err());
    }
}
