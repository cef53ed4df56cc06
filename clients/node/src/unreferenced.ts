import type { Socket } from 'node:net';

import { ChannelCredentials } from '@grpc/grpc-js';

type Connector = ReturnType<ChannelCredentials['_createSecureConnector']>;
type ConnectorArguments = Parameters<ChannelCredentials['_createSecureConnector']>;

/**
 * Credentials whose connections do not keep the program running, not even during a call.
 *
 * gRPC's own connections do so while a call is in flight. The stream of a client is always in flight, so that no
 * program would ever end by itself. A call that somebody waits for is kept by the timer of its caller.
 *
 * The methods with an underscore are gRPC's own, so `package.json` permits only the version that they are from.
 */
export class UnreferencedCredentials extends ChannelCredentials {
  readonly #inner: ChannelCredentials;

  constructor(inner: ChannelCredentials) {
    super();
    this.#inner = inner;
  }

  override _isSecure(): boolean {
    return this.#inner._isSecure();
  }

  override _equals(other: ChannelCredentials): boolean {
    return this === other;
  }

  override _createSecureConnector(...args: ConnectorArguments): Connector {
    const connector = this.#inner._createSecureConnector(...args);
    return {
      connect: async (socket) => {
        const result = await connector.connect(socket);
        unreference(socket);
        unreference(result.socket);
        return result;
      },
      waitForReady: () => connector.waitForReady(),
      getCallCredentials: () => connector.getCallCredentials(),
      destroy: () => {
        connector.destroy();
      },
    };
  }
}

function unreference(socket: Socket): void {
  socket.unref();
  // gRPC refers to the socket again with each call.
  socket.ref = () => socket;
}
