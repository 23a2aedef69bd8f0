// The TypeScript SDK's own transport, as its documentation shows it: a dictionary of transports in memory. With
// BENCH_STORE it is hydrated by hand instead, for each request: one read from Redis, and the SDK's private fields.
import { createServer } from 'node:http';
import { randomUUID } from 'node:crypto';
import { McpServer } from '@modelcontextprotocol/sdk/server/mcp.js';
import { StreamableHTTPServerTransport } from '@modelcontextprotocol/sdk/server/streamableHttp.js';
import { createClient } from 'redis';
import { z } from 'zod';

const store = process.env.BENCH_STORE ? await createClient({ url: process.env.BENCH_STORE }).connect() : null;
const transports = new Map();

function build() {
  const server = new McpServer({ name: 'bench', version: '1' });
  server.registerTool('echo', { inputSchema: { text: z.string() } }, async ({ text }) => ({
    content: [{ type: 'text', text }],
  }));
  server.registerTool('progress', { inputSchema: { count: z.number() } }, async ({ count }, extra) => {
    const progressToken = extra._meta?.progressToken;
    for (let progress = 1; progress <= count; progress++)
      await extra.sendNotification({ method: 'notifications/progress', params: { progressToken, progress, total: count } });
    return { content: [{ type: 'text', text: 'done' }] };
  });
  return server;
}

async function open() {
  const transport = new StreamableHTTPServerTransport({
    sessionIdGenerator: () => randomUUID(),
    onsessioninitialized: async id => {
      if (store) await store.set(`bench:${id}`, '{}', { EX: 1800 });
      else transports.set(id, transport);
    },
  });
  await build().connect(transport);
  return transport;
}

async function hydrate(id) {
  if ((await store.get(`bench:${id}`)) === null) return null;
  const transport = new StreamableHTTPServerTransport({ sessionIdGenerator: () => id });
  await build().connect(transport);
  const inner = transport._webStandardTransport ?? transport;
  inner.sessionId = id;
  inner._initialized = true;
  return transport;
}

const http = createServer(async (request, response) => {
  try {
    const id = request.headers['mcp-session-id'];
    const transport = id === undefined ? await open() : store ? await hydrate(id) : transports.get(id);
    if (!transport) response.writeHead(404).end();
    else await transport.handleRequest(request, response);
  } catch (error) {
    console.error(error);
    response.writeHead(500).end();
  }
});
// Connections wait while the other opponents have their turn.
http.keepAliveTimeout = 600_000;
http.listen(Number(process.env.BENCH_PORT), '127.0.0.1');
