// The coordinator's services over gRPC-web, at the origin that served this page.

import { Code, ConnectError, createClient, type Interceptor } from "@connectrpc/connect";
import { createGrpcWebTransport } from "@connectrpc/connect-web";

import { AccessService } from "../gen/shanty/v1/access_pb";
import { JobService } from "../gen/shanty/v1/job_pb";
import { StatusService } from "../gen/shanty/v1/status_pb";
import { refused, token } from "./session";

const authorize: Interceptor = (next) => async (request) => {
  const value = token.peek();
  if (value) request.header.set("authorization", `Bearer ${value}`);
  try {
    return await next(request);
  } catch (error) {
    noteRefusal(error);
    throw error;
  }
};

const transport = createGrpcWebTransport({ baseUrl: location.origin, interceptors: [authorize] });

export const access = createClient(AccessService, transport);
export const jobs = createClient(JobService, transport);
export const statuses = createClient(StatusService, transport);

/** Asks for a token if the coordinator wants one. A stream tells so only once it is read. */
export function noteRefusal(error: unknown): void {
  const { code } = ConnectError.from(error);
  if (code === Code.Unauthenticated) refused.value = token.peek() ? messageOf(error) : "This coordinator asks who you are.";
}

/** What went wrong, in the coordinator's words. */
export function messageOf(error: unknown): string {
  const { code, rawMessage } = ConnectError.from(error);
  // A browser's own words for a connection that was not made or broke say little, and differ.
  const isBrowsers = code === Code.Unknown && /fetch|network|load failed/i.test(rawMessage);
  return isBrowsers || rawMessage === "" ? "the coordinator cannot be reached" : rawMessage;
}

/** Whether asking again may help: the coordinator is away, or cut the connection. */
export function mayPass(error: unknown): boolean {
  const { code } = ConnectError.from(error);
  return code !== Code.NotFound && code !== Code.Unauthenticated && code !== Code.PermissionDenied && code !== Code.InvalidArgument;
}
