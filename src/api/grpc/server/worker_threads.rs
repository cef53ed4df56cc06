//! The worker threads, which serve the connections. Each has a single-threaded runtime of its own: the tasks
//! of a connection never move between threads, and a commit of the journal, for which calls of many
//! connections wait, wakes each thread once.

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

/// How long the threads may take to end once the shutdown has begun.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(5);

/// The worker threads. They end with [`WorkerThreads::shut_down`], or when this is dropped.
#[derive(Debug)]
pub struct WorkerThreads {
    workers: Vec<Worker>,
    shutdown: CancellationToken,
    /// Has a token for each thread that has not ended.
    running: TaskTracker,
}

#[derive(Clone, Debug)]
struct Worker {
    runtime: Handle,
    connections: Arc<AtomicUsize>,
}

/// A connection's reservation on a thread. It counts there until this is dropped.
#[derive(Debug)]
#[must_use]
pub(super) struct WorkerSlot(Worker);

impl WorkerThreads {
    /// Starts `count` threads. `failed` is cancelled if one of them ends before the shutdown, which is a bug.
    /// Blocks until each thread has started.
    ///
    /// # Errors
    /// When the system gives no more threads or file descriptors.
    pub fn start(count: NonZeroUsize, failed: &CancellationToken) -> io::Result<Self> {
        // If a later thread cannot be started, this is dropped and ends those before it.
        let mut threads = Self {
            workers: vec![],
            shutdown: CancellationToken::new(),
            running: TaskTracker::new(),
        };
        for number in 0..count.get() {
            let (started, handle) = mpsc::sync_channel(1);
            let exit_guard = ExitGuard {
                shutdown: threads.shutdown.clone(),
                failed: failed.clone(),
                _running: threads.running.token(),
            };
            thread::Builder::new().name(format!("serve-{number}")).spawn(move || {
                let exit_guard = exit_guard;
                match Builder::new_current_thread().enable_all().build() {
                    Ok(runtime) => {
                        // The receiver is gone only if the start has failed.
                        let _ = started.send(Ok(runtime.handle().clone()));
                        // After the shutdown has begun, the runtime is dropped, and with it the tasks that
                        // still run.
                        runtime.block_on(exit_guard.shutdown.cancelled());
                    }
                    Err(error) => drop(started.send(Err(error))),
                }
            })?;
            let runtime = handle.recv().map_err(io::Error::other)??;
            threads.workers.push(Worker { runtime, connections: Arc::default() });
        }
        threads.running.close();
        Ok(threads)
    }

    /// Reserves a slot on the thread with the fewest connections.
    pub(super) fn reserve_slot(&self) -> WorkerSlot {
        let connections = |worker: &&Worker| worker.connections.load(Ordering::Relaxed);
        // `start` takes a count above zero, so there is at least one worker.
        let worker = self.workers.iter().min_by_key(connections).unwrap_or(&self.workers[0]);
        worker.connections.fetch_add(1, Ordering::Relaxed);
        WorkerSlot(worker.clone())
    }

    /// Whether no slot is reserved.
    pub(super) fn are_idle(&self) -> bool {
        self.workers.iter().all(|worker| worker.connections.load(Ordering::Acquire) == 0)
    }

    /// Ends the threads and drops the tasks that still run on them. Waits up to 5 seconds.
    pub async fn shut_down(&self) {
        self.shutdown.cancel();
        if timeout(SHUTDOWN_TIMEOUT, self.running.wait()).await.is_err() {
            warn!("a worker thread did not end in time");
        }
    }
}

impl Drop for WorkerThreads {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

/// Is dropped when its thread ends, also by a panic, and reports an end that was not a shutdown.
struct ExitGuard {
    shutdown: CancellationToken,
    failed: CancellationToken,
    _running: TaskTrackerToken,
}

impl Drop for ExitGuard {
    fn drop(&mut self) {
        if !self.shutdown.is_cancelled() {
            error!("a worker thread ended unexpectedly");
            self.failed.cancel();
        }
    }
}

impl WorkerSlot {
    /// Runs `task` on the slot's thread, and releases the slot when it ends. Dropping the handle aborts the
    /// task.
    pub(super) fn run<T: Send + 'static>(
        self,
        task: impl Future<Output = T> + Send + 'static,
    ) -> AbortOnDropHandle<T> {
        let runtime = self.0.runtime.clone();
        AbortOnDropHandle::new(runtime.spawn(async move {
            let _slot = self;
            task.await
        }))
    }
}

impl Drop for WorkerSlot {
    fn drop(&mut self) {
        // Pairs with the load in `are_idle`: a thread that reads 0 knows that the task has been dropped.
        self.0.connections.fetch_sub(1, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn workers(count: usize) -> WorkerThreads {
        WorkerThreads::start(NonZeroUsize::new(count).unwrap(), &CancellationToken::new()).unwrap()
    }

    /// Reserves a slot until the returned handle is dropped. Returns the thread's name with it.
    async fn occupy(workers: &WorkerThreads) -> (String, AbortOnDropHandle<()>) {
        let (send_name, name) = tokio::sync::oneshot::channel();
        let handle = workers.reserve_slot().run(async move {
            send_name.send(thread::current().name().unwrap_or_default().to_owned()).unwrap();
            std::future::pending::<()>().await;
        });
        (name.await.unwrap(), handle)
    }

    #[tokio::test]
    async fn a_connection_goes_to_the_thread_with_the_fewest_connections() {
        let workers = workers(3);
        let mut slots = vec![];
        for expected in ["serve-0", "serve-1", "serve-2", "serve-0"] {
            let (thread, slot) = occupy(&workers).await;
            assert_eq!(thread, expected);
            slots.push(slot);
        }
        let second = slots.remove(1);
        second.abort();
        let _ = second.await;
        assert_eq!(occupy(&workers).await.0, "serve-1");
        assert!(!workers.are_idle());
        workers.shut_down().await;
        assert!(workers.are_idle());
    }

    #[tokio::test]
    async fn a_shutdown_aborts_what_still_runs_and_is_not_reported_as_a_failure() {
        let failed = CancellationToken::new();
        let workers = WorkerThreads::start(NonZeroUsize::MIN, &failed).unwrap();
        let (_, endless) = occupy(&workers).await;
        workers.shut_down().await;
        assert!(endless.await.is_err());
        assert!(!failed.is_cancelled());
    }

    #[tokio::test]
    async fn a_thread_that_ends_by_itself_is_reported_as_a_failure() {
        let failed = CancellationToken::new();
        let exit_guard = ExitGuard {
            shutdown: CancellationToken::new(),
            failed: failed.clone(),
            _running: TaskTracker::new().token(),
        };
        let panicked = thread::spawn(move || {
            let _exit_guard = exit_guard;
            panic!("the test's own panic");
        });
        failed.cancelled().await;
        assert!(panicked.join().is_err());
    }
}
