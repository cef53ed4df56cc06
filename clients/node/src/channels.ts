import { type ChannelCredentials, Client, connectivityState as State } from '@grpc/grpc-js';

import { serviceConfig } from './service-config.js';
import type { Endpoint } from './settings.js';

const OPTIONS = {
  'grpc.service_config': JSON.stringify(withoutRetries()),
  'grpc.service_config_disable_resolution': 1,
  'grpc.keepalive_time_ms': 20_000,
  'grpc.keepalive_timeout_ms': 10_000,
  'grpc.keepalive_permit_without_calls': 1,
  // A broker that is back is found within a second, as the pauses between asks suggest.
  'grpc.initial_reconnect_backoff_ms': 100,
  'grpc.max_reconnect_backoff_ms': 1000,
  // The connections of a client end with it.
  'grpc.use_local_subchannel_pool': 1,
};

/** How long the state of all channels is waited for before it is looked at again. */
const LOOK_AGAIN_MS = 1000;

/**
 * The connections to all endpoints, one channel for each. gRPC spreads the calls of a channel over the addresses
 * of its host; this class spreads them over the channels, because gRPC knows one name for each channel, and the
 * certificates of endpoints may have different ones.
 */
export class Channels {
  readonly #clients: readonly Client[];
  #last = -1;
  #inUse = 0;
  #isRetired = false;

  constructor(endpoints: readonly Endpoint[], credentials: ChannelCredentials) {
    this.#clients = endpoints.map(({ address }) => new Client(`dns:${address}`, credentials, OPTIONS));
  }

  /** Returns the client for the next call: a connected one in turn, if there is any within `timeoutMs`. */
  async pick(timeoutMs: number): Promise<Client> {
    const end = performance.now() + timeoutMs;
    for (;;) {
      const states = this.#clients.map((client) => client.getChannel().getConnectivityState(true));
      const left = end - performance.now();
      const choice = choose(states, this.#last, left <= 0);
      if (choice !== undefined) {
        this.#last = choice;
        return this.#clients[choice] as Client;
      }
      await this.#change(states, Math.min(left, LOOK_AGAIN_MS));
    }
  }

  /** Counts a call until the returned function is called. */
  use(): () => void {
    this.#inUse++;
    return () => {
      this.#inUse--;
      this.#closeIfUnused();
    };
  }

  /** Closes the connections after the last call. */
  retire(): void {
    this.#isRetired = true;
    this.#closeIfUnused();
  }

  close(): void {
    for (const client of this.#clients) {
      client.close();
    }
  }

  #closeIfUnused(): void {
    if (this.#isRetired && this.#inUse === 0) {
      this.close();
    }
  }

  /** Waits until a channel has another state, but not for longer than `timeoutMs`. */
  async #change(states: readonly State[], timeoutMs: number): Promise<void> {
    await new Promise<void>((resolve) => {
      for (const [index, client] of this.#clients.entries()) {
        const state = states[index] as State;
        client.getChannel().watchConnectivityState(state, Date.now() + timeoutMs, () => {
          resolve();
        });
      }
    });
  }
}

/**
 * Returns the index of the channel for the next call: the next connected one after `last`. Returns nothing while
 * none is connected and one may become so, unless there is no time to wait for it. If all have failed, the next
 * one says why.
 */
export function choose(states: readonly State[], last: number, isLate: boolean): number | undefined {
  const inTurn = states.map((_, step) => (last + 1 + step) % states.length);
  const ready = inTurn.find((index) => states[index] === State.READY);
  if (ready !== undefined) {
    return ready;
  }
  const mayConnect = states.some((state) => state === State.IDLE || state === State.CONNECTING);
  return states.length > 1 && mayConnect && !isLate ? undefined : inTurn[0];
}

/**
 * Returns the service config without gRPC's retries. A client repeats an ask itself, on another endpoint if there is
 * one, and knows why the attempts failed when its time is up. A call that has reached no broker is still repeated.
 */
function withoutRetries(): object {
  const methodConfig = serviceConfig.methodConfig.map((config) => ({ ...config, retryPolicy: undefined }));
  return { ...serviceConfig, methodConfig };
}
