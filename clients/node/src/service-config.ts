/** The service config of all clients, `clients/service_config.json`. A test compares both. */
export const serviceConfig = {
  loadBalancingConfig: [{ round_robin: {} }],
  healthCheckConfig: { serviceName: 'token_broker.v1.TokenService' },
  methodConfig: [
    {
      name: [
        { service: 'token_broker.v1.TokenService', method: 'GetToken' },
        { service: 'token_broker.v1.TokenService', method: 'ReportRejectedToken' },
        { service: 'token_broker.v1.TokenService', method: 'ListAccounts' },
      ],
      timeout: '60s',
      retryPolicy: {
        maxAttempts: 4,
        initialBackoff: '0.1s',
        maxBackoff: '1s',
        backoffMultiplier: 2,
        retryableStatusCodes: ['UNAVAILABLE', 'RESOURCE_EXHAUSTED'],
      },
    },
    {
      name: [{ service: 'token_broker.v1.TokenService', method: 'WatchTokens' }],
    },
  ],
};
