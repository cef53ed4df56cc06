//! Groups of tasks that are started and stopped together.

use std::time::Duration;

use tokio::{task::JoinHandle, time::timeout};
use tokio_util::sync::CancellationToken;

use super::supervise::supervise;

/// Tasks that are stopped together, by one token.
#[derive(Default)]
pub(super) struct TaskGroup {
    stop: CancellationToken,
    tasks: Vec<JoinHandle<()>>,
}

/// The tasks that run before calls are served.
#[derive(Default)]
pub(super) struct StartedTasks {
    /// The HTTP endpoints for operators.
    pub(super) background: TaskGroup,
    /// The history guard.
    pub(super) history: TaskGroup,
}

impl StartedTasks {
    /// Stops the tasks and waits until they have ended.
    pub(super) async fn stop(self) {
        self.background.stop().await;
        self.history.stop().await;
    }
}

impl TaskGroup {
    /// Returns the token that stops the tasks.
    pub(super) fn stop_token(&self) -> CancellationToken {
        self.stop.clone()
    }

    /// Adds a task that runs already. If it ends early, nothing happens.
    pub(super) fn add(&mut self, task: JoinHandle<()>) {
        self.tasks.push(task);
    }

    /// Starts a task. If it ends before the group is stopped, which is a bug, `failed` is cancelled.
    pub(super) fn start(
        &mut self,
        name: &'static str,
        failed: &CancellationToken,
        task: impl Future<Output = ()> + Send + 'static,
    ) {
        self.tasks.push(supervise(name, Box::pin(task), self.stop_token(), failed.clone()));
    }

    /// Stops the tasks and waits until they have ended.
    pub(super) async fn stop(self) {
        self.stop.cancel();
        for task in self.tasks {
            let _ = task.await;
        }
    }

    /// Stops the tasks, and waits up to `limit` for each of them.
    pub(super) async fn stop_within(self, limit: Duration) {
        self.stop.cancel();
        for task in self.tasks {
            let _ = timeout(limit, task).await;
        }
    }
}
