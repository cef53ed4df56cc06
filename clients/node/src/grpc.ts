import {
  create,
  type DescMessage,
  type DescMethodServerStreaming,
  type DescMethodUnary,
  fromBinary,
  type MessageInitShape,
  type MessageShape,
  toBinary,
} from '@bufbuild/protobuf';
import { type Client, credentials, Metadata, type ServiceError, status } from '@grpc/grpc-js';

import { Bearer } from './bearer.js';
import { Certificates } from './certificates.js';
import { Channels } from './channels.js';
import type { Clock } from './clock.js';
import { TokenBrokerError } from './errors.js';
import {
  type GetTokenResponse,
  type ReportRejectedTokenResponse,
  TokenService,
} from './gen/token_broker/v1/token_broker_pb.js';
import type { Settings } from './settings.js';
import { errorFromStatus } from './status.js';
import type { Stream, StreamEvents, Transport } from './transport.js';
import { UnreferencedCredentials } from './unreferenced.js';
import { closed } from './waiting.js';

/** How often the files for TLS are looked at. */
const LOOK_MS = 1000;

type UnaryMethod<I extends DescMessage, O extends DescMessage> = DescMethodUnary<I, O>;
type StreamMethod<I extends DescMessage, O extends DescMessage> = DescMethodServerStreaming<I, O>;

/** The calls to the broker over gRPC. */
export class GrpcTransport implements Transport {
  readonly #settings: Settings;
  readonly #clock: Clock;
  readonly #bearer: Bearer | undefined;
  readonly #certificates: Certificates | undefined;
  readonly #calls = new Set<{ cancel(): void }>();
  #channels: Channels;
  #stopLooking: (() => void) | undefined;
  #isClosed = false;

  /** Throws an `INVALID_ARGUMENT` error if the files of the settings cannot be used. */
  constructor(settings: Settings, clock: Clock) {
    this.#settings = settings;
    this.#clock = clock;
    const { bearerFile, logger } = settings;
    this.#bearer = bearerFile === undefined ? undefined : new Bearer(bearerFile, clock, logger);
    this.#certificates = settings.secure ? new Certificates(settings) : undefined;
    this.#channels = this.#connect();
  }

  getToken(account: string, newerThan: bigint, timeoutMs: number): Promise<GetTokenResponse> {
    const request = { account, newerThanGeneration: newerThan };
    return this.#unary(TokenService.method.getToken, request, account, timeoutMs);
  }

  report(
    account: string,
    generation: bigint,
    upstreamCode: string,
    timeoutMs: number,
  ): Promise<ReportRejectedTokenResponse> {
    const request = { account, generation, upstreamCode };
    return this.#unary(TokenService.method.reportRejectedToken, request, account, timeoutMs);
  }

  watch(accounts: readonly string[], events: StreamEvents): Stream {
    let cancel: (() => void) | undefined;
    let isCancelled = false;
    void this.#openStream(accounts, events).then((call) => {
      cancel = call;
      if (isCancelled) {
        cancel?.();
      }
    });
    return {
      cancel: () => {
        isCancelled = true;
        cancel?.();
      },
    };
  }

  start(onConnection: () => void): void {
    const certificates = this.#certificates;
    if (certificates === undefined) {
      return;
    }
    const look = () => {
      this.#stopLooking = this.#clock.after(LOOK_MS, look);
      if (certificates.reload()) {
        const old = this.#channels;
        this.#channels = this.#connect();
        onConnection();
        old.retire();
      }
    };
    look();
  }

  close(): void {
    this.#isClosed = true;
    this.#stopLooking?.();
    for (const call of this.#calls) {
      call.cancel();
    }
    this.#channels.close();
  }

  #connect(): Channels {
    const inner = this.#certificates
      ? credentials.createFromSecureContext(this.#certificates.context)
      : credentials.createInsecure();
    return new Channels(this.#settings.endpoints, new UnreferencedCredentials(inner));
  }

  /** Calls once, and once again if the bearer was refused and its file has another one now. */
  async #unary<I extends DescMessage, O extends DescMessage>(
    method: UnaryMethod<I, O>,
    fields: MessageInitShape<I>,
    account: string,
    timeoutMs: number,
  ): Promise<MessageShape<O>> {
    const end = this.#clock.now() + timeoutMs;
    const bearer = await this.#bearer?.current();
    try {
      return await this.#call(method, fields, account, bearer, end);
    } catch (error) {
      if (error instanceof TokenBrokerError && error.kind === 'UNAUTHENTICATED') {
        const other = await this.#bearer?.read();
        if (other !== bearer) {
          return await this.#call(method, fields, account, other, end);
        }
      }
      throw error;
    }
  }

  async #call<I extends DescMessage, O extends DescMessage>(
    method: UnaryMethod<I, O>,
    fields: MessageInitShape<I>,
    account: string,
    bearer: string | undefined,
    end: number,
  ): Promise<MessageShape<O>> {
    const channels = this.#channels;
    const release = channels.use();
    try {
      const client = await channels.pick(end - this.#clock.now());
      return await new Promise<MessageShape<O>>((resolve, reject) => {
        if (this.#isClosed) {
          throw closed(account);
        }
        const call = client.makeUnaryRequest(
          ...wire(method),
          create(method.input, fields),
          metadataFor(bearer),
          { deadline: Date.now() + (end - this.#clock.now()) },
          (error: ServiceError | null, answer?: MessageShape<O>) => {
            this.#calls.delete(call);
            if (error) {
              reject(this.#isClosed ? closed(account) : errorFromStatus(error, account));
            } else {
              resolve(answer as MessageShape<O>);
            }
          },
        );
        this.#calls.add(call);
      });
    } finally {
      release();
    }
  }

  /** Opens a stream, and returns the function that cancels it. */
  async #openStream(accounts: readonly string[], events: StreamEvents): Promise<(() => void) | undefined> {
    const channels = this.#channels;
    const release = channels.use();
    const bearer = await this.#bearer?.current();
    const client: Client = await channels.pick(LOOK_MS);
    if (this.#isClosed) {
      release();
      return undefined;
    }
    const method: StreamMethod<
      typeof TokenService.method.watchTokens.input,
      typeof TokenService.method.watchTokens.output
    > = TokenService.method.watchTokens;
    const request = create(method.input, { accounts: [...accounts] });
    const call = client.makeServerStreamRequest(...wire(method), request, metadataFor(bearer));
    this.#calls.add(call);
    let isCancelled = false;
    call.on('metadata', events.opened);
    call.on('data', events.message);
    // The status tells the same, and comes also when there is no error.
    call.on('error', () => undefined);
    call.on('status', (outcome) => {
      this.#calls.delete(call);
      release();
      if (!isCancelled && !this.#isClosed) {
        void this.#endStream(outcome, bearer, events);
      }
    });
    return () => {
      isCancelled = true;
      call.cancel();
    };
  }

  async #endStream(
    outcome: { code: status; details: string; metadata: Metadata },
    bearer: string | undefined,
    events: StreamEvents,
  ): Promise<void> {
    if (outcome.code === status.OK) {
      events.ended(undefined, false);
      return;
    }
    const error = errorFromStatus(outcome, undefined);
    const changed = error.kind === 'UNAUTHENTICATED' && (await this.#bearer?.read()) !== bearer;
    events.ended(error, changed);
  }
}

/** Returns the path of a method, and how its messages are written and read. */
function wire<I extends DescMessage, O extends DescMessage>(
  method: UnaryMethod<I, O> | StreamMethod<I, O>,
): [string, (message: MessageShape<I>) => Buffer, (bytes: Buffer) => MessageShape<O>] {
  return [
    `/${method.parent.typeName}/${method.name}`,
    (message) => Buffer.from(toBinary(method.input, message)),
    (bytes) => fromBinary(method.output, bytes),
  ];
}

function metadataFor(bearer: string | undefined): Metadata {
  const metadata = new Metadata();
  if (bearer !== undefined) {
    metadata.set('authorization', `Bearer ${bearer}`);
  }
  return metadata;
}
