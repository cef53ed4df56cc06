import type { TokenBrokerError } from './errors.js';
import type {
  GetTokenResponse,
  ReportRejectedTokenResponse,
  WatchTokensResponse,
} from './gen/token_broker/v1/token_broker_pb.js';

/** The calls to the broker. Each fails with a `TokenBrokerError`. */
export interface Transport {
  getToken(account: string, newerThan: bigint, timeoutMs: number): Promise<GetTokenResponse>;
  report(
    account: string,
    generation: bigint,
    upstreamCode: string,
    timeoutMs: number,
  ): Promise<ReportRejectedTokenResponse>;
  /** Opens a stream. Each stream ends with one call of `ended`, unless it is cancelled before. */
  watch(accounts: readonly string[], events: StreamEvents): Stream;
  /** Starts to look at the files of the settings. `onConnection` is called when calls use a new connection. */
  start(onConnection: () => void): void;
  /** Ends all calls and connections. */
  close(): void;
}

export interface Stream {
  cancel(): void;
}

export interface StreamEvents {
  /** The broker has accepted the stream. */
  opened: () => void;
  message: (message: WatchTokensResponse) => void;
  /**
   * The stream ended, with an error or properly. `bearerChanged` says that the file of the bearer has another
   * one now than the one that the stream was opened with.
   */
  ended: (error: TokenBrokerError | undefined, bearerChanged: boolean) => void;
}
